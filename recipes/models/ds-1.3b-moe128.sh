# DeepSpeed-MoE 1.3B+MoE-128 (arXiv:2201.05596): 52.5B parameters, 1.3B active.
#
# Fits 80 GB: LAYOUT=ep32 on 32 GPUs and more.
# The schedule is its own (arXiv:2201.05596, table 1, and the scripts published with it): 300B
# tokens of length 2048, 375M of them warm-up, and a lower rate than the dense model's.
VOCAB=50257
MODEL_ARGS=(--ep-preset ds-1.3b-moe128) # its biases leave --ep-fp8 out
TRAIN_ARGS=(
    --micro-batch-size 4 --global-batch-size 512 --train-iters 286102
    --lr 1.2e-4 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 358
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
