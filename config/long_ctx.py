# A small GPT at a context of 4096 bytes on the sources of Python's standard library, with SUS backprop.
# A few minutes on two CPU cores. Its exact twin: --attn_backward=exact --out_dir=out-exact

out_dir = "out-long-ctx"
dataset = "stdlib"

block_size = 4096
batch_size = 1
gradient_accumulation_steps = 1

n_layer = 4
n_head = 4
n_embd = 128
bias = False
pos = "rope"
norm = "rmsnorm"
qk_norm = True

attn_backward = "sus"
sus_c = 4.0

learning_rate = 1.5e-3
min_lr = 1.5e-4
max_iters = 400
lr_decay_iters = 400
warmup_iters = 30
beta2 = 0.99  # few tokens a step

eval_interval = 100
eval_iters = 24
log_interval = 5
