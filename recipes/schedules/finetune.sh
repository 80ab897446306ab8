# For weights that are trained already: 1000 iterations at a small learning rate.
#
# The schedule is nobody's: values in common use. Flags behind the script win.
TRAIN_ARGS=(
    --micro-batch-size 1 --global-batch-size 256 --train-iters 1000
    --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-fraction 0.05
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
