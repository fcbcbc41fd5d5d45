"""Small Hugging Face folders with tokenizers, made by the libraries themselves."""

import json

LINES = [
    "The tea is hot, and the kettle sings: it's 1984, or 12345 things.\n",
    "def main():\n    return [x for x in range(10)]\n\n\n",
    "naïve café, 漢字 and 🙂 <s>struck</s> text\n",
    "the quick brown fox jumps over the lazy dog\n",
] * 4
# Qwen's: how a text is cut before the search for merges.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
KINDS = "gpt2", "smollm2", "qwen", "llama", "unigram"


def tokenizer_folder(folder, kind):
    """Like that of these models. gpt2, smollm2 and qwen are byte-level, and differ in what comes before the merges;
    llama's puts a space before a text, has no cuts at all, and falls back to bytes; unigram's is of T5's kind.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_level = lambda regex=True: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    end = "<|endoftext|>"
    if kind in ("gpt2", "smollm2", "qwen"):
        made = tokenizers.Tokenizer(models.BPE())
        first = {
            "gpt2": [],
            "smollm2": [pre_tokenizers.Digits(individual_digits=True)],
            "qwen": [pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated")],
        }[kind]
        made.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level(kind != "qwen")])
        made.normalizer = normalizers.NFC() if kind == "qwen" else None
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[end, "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(LINES, trainer)
    else:
        end, special = "</s>", ["<unk>", "<s>", "</s>"]
        if kind == "llama":
            made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
            made.decoder = decoders.Sequence(
                [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
            pieces = [f"<0x{byte:02X}>" for byte in range(256)]
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + pieces, show_progress=False)
            words = [word for line in LINES for word in line.encode("ascii", "ignore").decode().split()]
            made.train_from_iterator(words, trainer)
            spec = json.loads(made.to_str())
            spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are no special tokens
            made = tokenizers.Tokenizer.from_str(json.dumps(spec))
        else:
            made = tokenizers.Tokenizer(models.Unigram())
            made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(
                vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
            )
            made.train_from_iterator(LINES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end).save_pretrained(folder)
    return folder
