# GLaM 64B/64E (arXiv:2112.06905): 1162B parameters, 96.6B active.
#
# Fits 80 GB: LAYOUT=tp4-ep64-pp8 on 512 GPUs and more.
# Published are batches of 1M tokens in sequences of 1024 (arXiv:2112.06905, section 5.1), 600B
# tokens for the largest, and Adafactor, which Megatron has not. Here Adam has the published form of
# the rate, the inverse square root after 10,000 steps, with the peak of the next larger GPT-3
# (arXiv:2005.14165, table 2.1) than its 96.6B active parameters.
VOCAB=256000
# With FP8 experts: --ep-fp8 rowwise
MODEL_ARGS=(
    --ep-preset glam-64b-64e
)
TRAIN_ARGS=(
    --micro-batch-size 1 --global-batch-size 1024 --train-iters 572205
    --lr 0.6e-4 --lr-decay-style inverse-square-root --lr-warmup-iters 10000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0 --clip-grad 1.0
)
