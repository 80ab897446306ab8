# DeepSpeed-MoE 350M+PR-MoE-32/64 (arXiv:2201.05596): 4.1B parameters, 0.5B active.
#
# Fits 80 GB: LAYOUT=ep8 on 8 GPUs and more, ep64 on 64 GPUs.
# The schedule is its own (arXiv:2201.05596, table 1, and the scripts published with it): 300B
# tokens of length 2048, 375M of them warm-up, and its own peak.
VOCAB=50257
MODEL_ARGS=(--ep-preset ds-350m-prmoe-32-64) # its biases leave --ep-fp8 out
TRAIN_ARGS=(
    --micro-batch-size 4 --global-batch-size 256 --train-iters 572205
    --lr 3e-4 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 715
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
