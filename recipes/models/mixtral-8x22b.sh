# Mixtral 8x22B (the published configuration of Instruct v0.1): 140.6B parameters, 39.2B active.
#
# Fits 80 GB: LAYOUT=tp2-ep8-pp8 on 128 GPUs and more.
# Its schedule is not published. This is Llama 2's of 34B (arXiv:2307.09288, section 2.2 and table
# 1), a dense model of about as many active parameters: batches of 4M tokens, 2T in all.
VOCAB=32768
# With FP8 experts: --ep-fp8 rowwise
MODEL_ARGS=(
    --ep-preset mixtral-8x22b --seq-length 4096
)
TRAIN_ARGS=(
    --micro-batch-size 1 --global-batch-size 1024 --train-iters 476837
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
