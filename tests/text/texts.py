"""Varied texts, and a small byte-level vocabulary trained on them."""

import random

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PIECES = [
    "Hello, world!",
    "  leading and   inner    spaces ",
    "tabs\tand\t\tmore\r\nwindows\r\n\r\nlines\n\n\nend\n",
    "I'm sure they'll say it's WE'VE 'quoted' don't",
    "1 22 333 4444 55555 3.14159 1,000,000 1e-9 0x7F ٣٤٥ ½ Ⅷ",
    "naïve café Straße Ünïcödé ﬁ ǅ",
    "cafe\u0301 n\u0303 ö o\u0308",
    "日本語のテキスト、中文字符。한국어 문장 ไทย हिन्दी العربية עברית",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ✈️ \U0001f9ff",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "<html><body class='x'>&amp;</body></html>",
    "https://example.com/a?b=c&d=%20e#f user@example.org",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>text<|im_end|><|im_end|>  <|im_start|>",
    "a" * 300,
    " " * 70 + "x" + "\n" * 40,
    "zero\u200bwidth\u2060joiners\u00adsoft\ufeffbom \u2028line\u2029para\u00a0nbsp\u3000wide",
    "\x00\x01\x1f\x7f control",
    "∑∫√π≈≠ ←→ «guillemets» „quotes“ …—–",
    "ALLCAPS camelCase snake_case kebab-case PascalCase x1y2z3",
    "",
    " ",
    "\n",
]


def varied(count: int = 240) -> list[str]:
    """The pieces, and random joins of them."""
    rng = random.Random(7)
    return PIECES + ["".join(rng.choices(PIECES, k=rng.randint(2, 5))) for _ in range(count - len(PIECES))]


any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from([*PIECES, " ", "\n", "1", "a", "é", "😀", "<|im_end|>"]), max_size=8).map(
        "".join
    ),
)


def train_byte_level(vocab_size: int = 500) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(PIECES * 3, trainer)
    return core


def train_sentencepiece(vocab_size: int = 700) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and token types as a GGUF file of a SentencePiece BPE model has them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(PIECES * 3, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    learned = [core.id_to_token(i) for i in range(core.get_vocab_size())]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *learned, "<turn>"]
    scores = [0.0] * 259 + [-float(n) for n in range(len(learned))] + [0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(learned) + [4]
    return tokens, scores, types
