# Switch-Base (arXiv:2101.03961), its decoder: 128 experts in every second layer.
#
# Fits 80 GB: LAYOUT=tp2-ep4 on 4 GPUs, tp2-ep8 on 8 GPUs.
# Published are batches of 2^20 tokens in sequences of 512, 550,000 of them (arXiv:2101.03961,
# section 4.1), and Adafactor, which Megatron has not. Here Adam has the published form of the
# rate, the inverse square root after 10,000 steps, with the peak of the next larger GPT-3
# (arXiv:2005.14165, table 2.1) than its 0.2B active parameters.
VOCAB=32128
# With FP8 experts: --ep-fp8 rowwise
MODEL_ARGS=(
    --ep-preset switch-base-128
)
TRAIN_ARGS=(
    --micro-batch-size 8 --global-batch-size 2048 --train-iters 550000
    --lr 3e-4 --lr-decay-style inverse-square-root --lr-warmup-iters 10000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0 --clip-grad 1.0
)
