# DeepSeek-V3 (arXiv:2412.19437): 671B parameters, 37.6B active; without multi-token prediction.
#
# Fits 80 GB: LAYOUT=ep32-pp16 or tp4-ep64-pp8 on 512 GPUs, ep64-pp16 on 1024 GPUs.
# The schedule is its own (section 4.2): 14.8T tokens of length 4096, batches from 3072 to 15360
# over the first 469B, 2000 batches of warm-up, a constant rate up to 10T tokens, then a cosine over
# 4.3T. The last 500B are at 2.2e-5 here; published are 333B at that and 167B at 7.3e-6, and
# --moe-router-bias-update-rate 0 for all 500B.
VOCAB=129280
RECOMPUTE="${RECOMPUTE:-full}"
# With FP8 experts as published: --ep-fp8 blockwise
MODEL_ARGS=(
    --ep-preset deepseek-v3
)
PIPELINE_LAYOUT=([8]="Et*7|(t*8|)*6t*6L" [16]="Et*3|(t*4|)*14t*2L")
TRAIN_ARGS=(
    --micro-batch-size 1 --global-batch-size 15360 --rampup-batch-size 3072 768 114501953
    --train-samples 3613281250 --lr-decay-samples 3491210937
    --lr 2.2e-4 --min-lr 2.2e-5 --lr-warmup-samples 6144000
    --lr-decay-style WSD --lr-wsd-decay-style cosine --lr-wsd-decay-samples 1049804687
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
