"""Tokenizers that read byte by byte, made without a download: of every text another row of numbers."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's chat template, as far as pipelines use it."""
VOCABULARY = 300
DECODER_ONLY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
}
"""Sizes of a small language model that reads these tokens: Qwen3, Gemma 2, GLM."""


def byte_tokenizer(
    specials: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    *,
    begin: str | None = None,
    template: str | None = None,
    padding_side: str = "right",
) -> PreTrainedTokenizerBase:
    """A tokenizer of the 256 bytes and special tokens, all below `VOCABULARY`.

    Args:
        specials: further special tokens.
        begin: a token in front of every text; None for none.
        template: the chat template.
        padding_side: "left" or "right".
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, "<pad>", *([begin] if begin else []), *specials]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, names.index(begin))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=begin,
        additional_special_tokens=list(specials),
        padding_side=padding_side,
    )
    wrapped.chat_template = template
    return wrapped
