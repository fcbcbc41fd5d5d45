# A GPT that was trained at a context of 1024 bytes, extended to 8192 by LoRA, with SUS backprop.
# A few minutes on two CPU cores, after about as many for the model that it begins with:
#     python train.py config/long_ctx.py --block_size=1024 --batch_size=4 --max_iters=1000 --lr_decay_iters=1000 \
#         --out_dir=out-1k
#     python train.py config/lora_long_ctx.py
# Positions stretched, so that none is beyond those of its training: --rope_scaling=8 --out_dir=out-lora-stretched
# All weights instead of adapters: --lora_rank=0 --out_dir=out-full

out_dir = "out-lora"
init_from = "out-1k"
dataset = "stdlib"

block_size = 8192
rope_scaling = 1.0
batch_size = 1
gradient_accumulation_steps = 1

lora_rank = 8
lora_alpha = 16.0
lora_targets = "c_attn,c_proj,c_fc"

attn_backward = "sus"
sus_c = 4.0

learning_rate = 2e-3
min_lr = 2e-4
max_iters = 200
lr_decay_iters = 200
warmup_iters = 10
beta2 = 0.99  # few tokens a step

eval_interval = 50
eval_iters = 24
log_interval = 5
