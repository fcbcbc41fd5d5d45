# SmolLM2-135M, trained at a context of 8192 tokens, extended to 32768 with YaRN and SUS, on whole books. For one GPU:
#     python examples/smollm2.py                          # makes models/smollm2
#     python data/text/prepare.py --input=FOLDER --out=books --tokenizer=models/smollm2
#     python train.py config/extend_smollm2.py --dataset=books
# A larger base of the wavelengths instead of YaRN: --rope_type=default --rope_scaling=1 --rope_theta=400000
# LoRA: --lora_rank=16 --learning_rate=2e-4 --min_lr=2e-5 --out_dir=out-smollm2-32k-lora
# A try on two CPU cores: --block_size=2048 --rope_original_context=512 --gradient_accumulation_steps=1 --max_iters=5 \
#     --eval_iters=1 --eval_interval=5
# Then: python export.py --out_dir=out-smollm2-32k --to=models/smollm2-32k

out_dir = "out-smollm2-32k"
init_from = "models/smollm2"
dataset = "books"
doc_mask = True

block_size = 32768
rope_type = "yarn"
rope_scaling = 4.0  # of the 8192 positions that it knows
batch_size = 1
gradient_accumulation_steps = 8  # 0.26 M tokens a step

activation_checkpointing = "attention"
attn_backward = "sus"
sus_c = 8.0

learning_rate = 2e-5
min_lr = 2e-6
max_iters = 400
lr_decay_iters = 400
warmup_iters = 20
weight_decay = 0.0

eval_interval = 50
eval_iters = 8
log_interval = 1
