"""Prompts that ask for words to be drawn: `a wooden sign that says "fresh bread"`.

Phrases are composed from four lists of words by eight patterns, and each is written on one of many things in one of
many places. A phrase is either trained or held out, whatever it is written on.
"""

from __future__ import annotations

import hashlib
import itertools
import random

from dgpo_fast.prompts.prompt import Prompt, PromptSets

_ADJECTIVES = """
amber ancient bitter bold brave bright broken calm clean clear clever cold cosy crisp curious daily damp dark deep
distant double dry dusty early easy electric empty fair famous fancy final first fluffy foggy fresh friendly frozen
gentle giant golden grand happy hidden hollow honest humble icy jolly kind large last late lazy light little local
lonely loud lucky magic mellow mighty misty modern narrow noble open orange patient perfect plain polite proud pure
quick quiet rapid rare royal rusty salty secret shiny silent silver simple sleepy slow smooth snowy soft solid spicy
steady stormy strong sunny sweet swift tender tiny urban velvet vivid warm wild windy wise wooden young
"""

_NOUNS = """
acorn anchor apple arrow autumn bakery balloon banjo barn basket beach bell bicycle bird blanket boat book bottle
bread breeze brick bridge bucket butter button cabin cactus camera candle canyon carpet castle cat cedar cellar chair
cheese cherry circus clock cloud coast coffee comet copper coral cottage cricket crown daisy dance desert diamond
dinner dolphin dragon dream drum eagle earth echo engine feather festival field fiddle fire flower flute forest fox
garden ginger glacier glove grape guitar hammer harbor harvest hat hill honey horizon horse hotel house island jacket
jungle kettle key kitchen kite ladder lake lantern lemon library lighthouse lion lunch mango maple market meadow melon
mirror monkey moon morning mountain museum music needle night nutmeg oasis ocean olive orchard otter owl oyster paper
parade park peach pebble pepper piano picnic pillow pine planet pocket pony pottery pumpkin rabbit radio rain raven
ribbon river road robin rocket rose sail salad salmon sand school shadow ship shore silk sky snow soup spoon spring
star station stone storm street sugar summer sun table teapot temple thunder ticket tiger toast tower train tulip
turtle valley village violin wagon walnut water whale wheat window winter wolf wood yard zebra
"""

_VERBS = """
ask bake borrow bring build buy call carry catch chase choose clean climb collect cook count cross cut deliver discover
draw drink enjoy explore feed find fix follow forget grow guard help hold imagine invent join keep kiss know learn lift
love make measure meet mend move open order paint pick plant play polish protect pull push read remember rent repair
reserve ride save see sell send serve share shine sing stop taste teach thank touch trade try turn visit wash watch
weave welcome win write
"""

_PLACES = """
alley attic avenue bay bistro cafe clinic club corner court deli diner dock farm gallery gym inn lane lodge lounge mill
office pier plaza pub resort salon shop spa square store studio terrace theater yoga
"""

_THINGS = """
a wooden sign | a neon sign | a road sign | a shop sign | a street banner | a chalkboard | a billboard | a poster |
a coffee mug | a t-shirt | a book cover | a birthday cake | a postcard | a train ticket | a license plate | a doormat |
a cereal box | a balloon | a newspaper | a magazine cover | a paper cup | a street mural | a brick wall |
a museum plaque | a tote bag | a baseball cap | a glass bottle | a gift card | a menu board | a laptop screen |
a stone tablet | a hot air balloon | a delivery van | a garden gate | a candy wrapper
"""

_PLACES_TO_SEE_IT = """
| in a sunny field | on a busy street | by the sea | in a quiet forest | on a snowy mountain | in a small cafe |
in front of an old house | at night | in the rain | at sunset | on a kitchen table | in a library | at a train station |
under a blue sky | in a flower market | beside a lake | in a cluttered workshop | on a city rooftop | in a museum hall
"""

_WORDINGS = ("that says", "that reads", "with the words", "with the text", "saying")
_LONGEST = 20  # characters; longer phrases are beyond what a model of this class writes


def sign_prompts(held_out: int = 256, train: int = 20_000, seed: int = 0) -> PromptSets:
    """Sign prompts with distinct phrases in quotes; metadata is `{"tag": "ocr", "text": phrase}`.

    Args:
        held_out: number of evaluation prompts, at most the tenth of the phrases set aside for them (about 5,000).
            They do not depend on `seed`.
        train: number of training prompts, at most the remaining phrases (about 47,000).
        seed: of the training prompts.
    """
    reserved: list[str] = []
    trained: list[str] = []
    for phrase in _phrases():
        in_last_tenth = hashlib.sha256(phrase.lower().encode()).digest()[0] >= 230
        (reserved if in_last_tenth else trained).append(phrase)
    return PromptSets(
        train=_write(trained, train, random.Random(f"{seed} signs")),
        held_out=_write(reserved, held_out, random.Random("held-out signs")),
    )


def _phrases() -> list[str]:
    """All phrases, distinct however they are spelt, in a fixed order."""
    adjectives, nouns, verbs, places = (words.split() for words in (_ADJECTIVES, _NOUNS, _VERBS, _PLACES))
    composed = itertools.chain(
        itertools.product(nouns),
        itertools.product(adjectives),
        itertools.product(verbs),
        itertools.product(adjectives, nouns),
        itertools.product(verbs, ["the"], nouns),
        itertools.product(nouns, places),
        itertools.product(adjectives, places),
        itertools.product(nouns, map(str, range(2, 100, 7))),
    )
    distinct = dict.fromkeys(" ".join(words) for words in composed)
    return [_cased(phrase) for phrase in distinct if len(phrase) <= _LONGEST]


def _cased(phrase: str) -> str:
    """The phrase as sign writers spell it: lower case, Title Case or CAPITALS, always the same for one phrase."""
    styles = (str.lower, str.title, str.upper)
    return styles[hashlib.sha256(phrase.encode()).digest()[1] % 3](phrase)


def _write(phrases: list[str], size: int, rng: random.Random) -> list[Prompt]:
    """`size` of the phrases, each written on something somewhere."""
    things, places = _choices(_THINGS), _choices(_PLACES_TO_SEE_IT)
    prompts = []
    for phrase in rng.sample(phrases, min(size, len(phrases))):
        text = f'{rng.choice(things)} {rng.choice(_WORDINGS)} "{phrase}" {rng.choice(places)}'.strip()
        prompts.append(Prompt(text, {"tag": "ocr", "text": phrase}))
    return prompts


def _choices(listing: str) -> list[str]:
    return [" ".join(item.split()) for item in listing.split("|")]
