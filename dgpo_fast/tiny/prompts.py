"""The prompts of the miniature world, as generators to train and to evaluate on."""

from dgpo_fast.prompts.files import in_hash_order
from dgpo_fast.prompts.prompt import Prompt, PromptSets, in_proportion
from dgpo_fast.tiny import data


def shape_prompts(held_out: int) -> PromptSets:
    """Coloured shapes, trained in their mix of tags and evaluated with every tag equally often."""
    train = [Prompt(text, metadata) for text, metadata in data.shape_prompts("train")]
    evaluation = [Prompt(text, metadata) for text, metadata in data.balanced(data.shape_prompts("heldout"), held_out)]
    return PromptSets(train=in_proportion(train, data.TAG_MIX), held_out=evaluation)


def sign_prompts(held_out: int) -> PromptSets:
    """Words on signs."""
    train = [Prompt(text, metadata) for text, metadata in data.sign_prompts("train")]
    evaluation = [Prompt(text, metadata) for text, metadata in data.sign_prompts("heldout")]
    return PromptSets(train=train, held_out=in_hash_order(evaluation)[:held_out])
