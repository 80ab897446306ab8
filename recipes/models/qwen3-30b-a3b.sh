# Qwen3-30B-A3B (arXiv:2505.09388): 30.5B parameters, 3.4B active.
#
# Fits 80 GB: LAYOUT=ep8-pp2 on 16 GPUs, ep8-pp4 on 32 GPUs.
# Published are its 30T tokens of length 4096 (section 3.2, first stage), not its rate and batch.
# Those are DeepSeek-V2-Lite's (arXiv:2405.04434, appendix B), with 2.4B active parameters, whose
# decay in two steps ends where this cosine does.
VOCAB=151936
# With FP8 experts: --ep-fp8 rowwise
MODEL_ARGS=(
    --ep-preset qwen3-30b-a3b
)
TRAIN_ARGS=(
    --micro-batch-size 1 --global-batch-size 4608 --train-iters 1589457
    --lr 4.2e-4 --min-lr 4.2e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
