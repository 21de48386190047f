"""What this project computes of a model, in words: for `convert inspect`."""

from f2llm_jax.hf_settings import Note
from f2llm_jax.model.decoder import count_parameters
from f2llm_jax.weights.models import ModelSource


def describe(model: ModelSource) -> str:
    """Everything that decides a vector, where it was read, and what of the folder is not read and why."""
    config, embedding = model.config, model.embedding
    taken = {note.reason: note for note in model.notes if note.reason.startswith("taken as")}
    widths = ", ".join(map(str, embedding.served_dims)) or "none known"
    lines = [
        ("model", model.name),
        ("parameters", f"{count_parameters(config):,}"),
        ("layers", f"{config.num_hidden_layers}, serves with {', '.join(map(str, embedding.depths)) or 'all of them'}"),
        ("width", f"{model.width} of {config.hidden_size}; trained for shorter: {widths}"),
        ("attention", f"causal, {config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {config.head_dim}"),
        ("rotary base", f"{config.rope_theta:g}"),
        ("pooling", "the last token, then length 1" + ("" if _told(model) else "; no modules.json says so: a base model")),
        ("similarity", "cosine"),
        ("text limit", f"{model.text_limit} tokens{_place(taken.get('taken as the longest text'))}"),
        *_tokenizer(model),
        *((f"prompt {name}", repr(prompt)) for name, prompt in embedding.prompts.items()),
    ]
    described = "\n".join(f"{label:<16}{text}" for label, text in lines)
    ignored: dict[tuple[str, str, str], list[str]] = {}
    for note in model.notes:
        if note.verdict != "computed":
            ignored.setdefault((note.file, note.verdict, note.reason), []).append(note.key)
    reasons = [f"  {file}: {', '.join(keys)} ({verdict}: {reason})" for (file, verdict, reason), keys in ignored.items()]
    return "\n".join([described, *(["ignored:", *reasons] if reasons else [])])


def _told(model: ModelSource) -> bool:
    return not model.notes or any(note.file == "modules.json" for note in model.notes)


def _tokenizer(model: ModelSource) -> list[tuple[str, str]]:
    if model.tokenizer is None:
        return [("end token", "unknown: there is no tokenizer.json")]
    tokenizer = model.tokenizer
    before = [tokenizer.decode([number]) for number in tokenizer.encode([""], 2**31 - 1)[0][:-1]]
    return [
        ("end token", f"{tokenizer.decode([tokenizer.end_id])} ({tokenizer.end_id})"),
        ("begin token", " ".join(before) or "none"),
        ("token ids", f"below {tokenizer.vocab_size}, of {model.config.vocab_size} embedding rows"),
    ]


def _place(note: Note | None) -> str:
    return f" ({note.file}: {note.key})" if note else ""
