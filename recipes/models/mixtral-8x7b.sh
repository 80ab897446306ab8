# Mixtral 8x7B (arXiv:2401.04088): 46.7B parameters, 12.9B active.
#
# Fits 80 GB: LAYOUT=ep8-pp4 on 32 GPUs and more.
# Its schedule is not published. This is Llama 2's of 13B (arXiv:2307.09288, section 2.2 and table
# 1), a dense model of as many active parameters: batches of 4M tokens, 2T in all. Sequences of
# 4096 too; for the 32,768 of the model add --seq-length 32768 --context-parallel-size 8.
VOCAB=32000
# With FP8 experts: --ep-fp8 rowwise
MODEL_ARGS=(
    --ep-preset mixtral-8x7b --seq-length 4096
)
TRAIN_ARGS=(
    --micro-batch-size 1 --global-batch-size 1024 --train-iters 476837
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
