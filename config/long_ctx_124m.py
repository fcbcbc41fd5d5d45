# GPT-2's size in the shape of Qwen3, which export.py writes for Hugging Face, at a context of 32k tokens with SUS
# backprop, for one 80 GB GPU or several:
#     python data/pg19/prepare.py      # books; or others: see README
#     python train.py config/long_ctx_124m.py
#     torchrun --standalone --nproc_per_node=8 train.py config/long_ctx_124m.py

out_dir = "out-long-ctx-124m"
dataset = "pg19"
windows = "document"

block_size = 32768
batch_size = 1
gradient_accumulation_steps = 16  # 0.5 M tokens a step, as GPT-2

n_layer = 12
n_head = 12
n_embd = 768
mlp = "swiglu"
intermediate_size = 2048  # as many weights as GELU's with 4 x 768
bias = False
pos = "rope"
rope_theta = 500000.0
norm = "rmsnorm"
qk_norm = True
activation_checkpointing = "attention"  # all but attention is computed again in the backward

attn_backward = "sus"
sus_c = 8.0  # tiles a row: at this length more of them cost little

learning_rate = 6e-4
min_lr = 6e-5
max_iters = 20000
lr_decay_iters = 20000
warmup_iters = 700

eval_interval = 500
eval_iters = 16
log_interval = 10
