# nanoGPT's character-level Shakespeare: a good first run for debugging.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char.py
# That is for a GPU. On a laptop's CPU, in a few minutes:
#     python train.py config/train_shakespeare_char.py --eval_iters=20 --log_interval=1 --block_size=64 \
#         --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
# Its dropout needs the exact backward; SUS: --attn_backward=sus --dropout=0.0

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, because it overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
attn_backward = "exact"

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
