"""A decoder-only teacher and student that share a vocabulary."""

from pathlib import Path

from models.decoder_families import continuing_tokenizer, tiny_decoder

from tiny import WORDS, save_pretrained


def save_decoders(folder: Path) -> None:
    """folder/{decoder-teacher,decoder-student}."""
    words = [*WORDS[:3], "<s>", *WORDS[3:]]
    tokenizer = continuing_tokenizer(words)
    for seed, role in enumerate(("decoder-teacher", "decoder-student")):
        model = tiny_decoder("llama", seed=seed, words=len(words))
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        save_pretrained(folder / role, model, tokenizer)
