# Qwen3-235B-A22B (arXiv:2505.09388): 235.1B parameters, 22.2B active.
#
# Fits 80 GB: LAYOUT=tp2-ep8-pp8 on 128 GPUs; RECOMPUTE=none LAYOUT=tp4-ep16-pp8 on 128 and more.
# Published are its 30T tokens of length 4096 (section 3.2, first stage), not its rate and batch.
# Those are DeepSeek-V2's (arXiv:2405.04434, section 3.1.2), with 236B parameters and 21B active:
# batches from 2304 to 9216 over the first 225B tokens, and a decay in two steps that ends where
# this cosine does.
VOCAB=151936
RECOMPUTE="${RECOMPUTE:-full}"
# With FP8 experts: --ep-fp8 rowwise
MODEL_ARGS=(
    --ep-preset qwen3-235b-a22b
    # 94 layers, embedding and loss are 96.
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
)
TRAIN_ARGS=(
    --micro-batch-size 1 --global-batch-size 9216 --rampup-batch-size 2304 768 54931640
    --train-samples 7324218750
    --lr 2.4e-4 --min-lr 2.4e-5 --lr-decay-style cosine --lr-warmup-samples 4608000 # 2000 batches
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
