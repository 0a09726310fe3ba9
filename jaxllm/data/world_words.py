"""The words of the micro-world, in English and Chinese, and which of them and of their combinations are held out.

Two rules make exact evaluation possible by construction, for any amount of data:

* `is_held_out(words)` decides by a checksum of the content, not by chance, so a fifth of all (person, colour, thing)
  triples, reviews, film logs and baskets is written into no document and no conversation, ever.
* `LATE_WORDS` occur in documents but in no conversation, `NOVEL_PEOPLE` in neither.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

EN, ZH = 0, 1  # index of a language in every bilingual tuple
HELD_OUT_ONE_IN = 5  # contents


class Word(NamedTuple):
    """One meaning, `word[EN]` and `word[ZH]`."""

    en: str
    zh: str


class Thing(NamedTuple):
    """A noun with its Chinese measure word (一`个`苹果) and its kind, such as fruit."""

    en: str
    zh: str
    measure: str
    kind: Word


def _words(text: str) -> tuple[Word, ...]:
    return tuple(Word(*entry.split(":")) for entry in text.split())


def _things(kind: Word, text: str) -> tuple[Thing, ...]:
    return tuple(Thing(*entry.split(":"), kind) for entry in text.split())


KINDS = _words("fruit:水果 animal:动物 toy:玩具 tool:工具 garment:衣服")
# Of each kind the last thing is late; of the people and adjectives, the last ones.
THINGS = (
    _things(KINDS[0], "banana:香蕉:根 pear:梨子:个 lemon:柠檬:个 peach:桃子:个 melon:甜瓜:个")
    + _things(KINDS[1], "cat:猫咪:只 dog:小狗:只 horse:马儿:匹 rabbit:兔子:只 duck:鸭子:只")
    + _things(KINDS[2], "ball:皮球:个 kite:风筝:只 doll:娃娃:个 drum:小鼓:面 robot:机器人:个")
    + _things(KINDS[3], "hammer:锤子:把 spade:铲子:把 rope:绳子:条 lamp:台灯:盏 brush:刷子:把")
    + _things(KINDS[4], "hat:帽子:顶 coat:外套:件 shirt:衬衫:件 scarf:围巾:条 glove:手套:只")
)
PEOPLE = _words(
    "Anna:安娜 Tom:汤姆 Lily:莉莉 Ben:本杰明 Mary:玛丽 Jack:杰克 Rose:罗丝 Paul:保罗 "
    "Emma:艾玛 Leo:里奥 Nina:尼娜 Max:马克斯 Lucy:露西 Dan:丹尼 Kate:凯特 Hugo:雨果"
)
NOVEL_PEOPLE = tuple(
    Word(name, name) for name in ["Zorin", "Melka", "Tavi", "Quenna", "Brudo", "Yalis", "Pexo", "Wilmar"]
)
# The second persons of stories, never their heroes, so that nobody meets themselves; in all else persons like others.
RELATIVES = _words("Mum:妈妈 Dad:爸爸 Grandma:奶奶 Grandpa:爷爷 Aunt:阿姨 Uncle:叔叔")
COLOURS = _words("red:红色 blue:蓝色 green:绿色 yellow:黄色 black:黑色 white:白色")
VERBS = _words("sees:看见 wants:想要 likes:喜欢 buys:购买 draws:描画 finds:找到")
PLACES = _words("garden:花园 kitchen:厨房 park:公园 school:学校 library:图书馆 forest:森林 market:市场 station:车站")
ASPECTS = _words("food:饭菜 room:房间 music:音乐 service:服务 film:电影 view:风景")
PRAISE = _words(
    "good:很好 great:很棒 lovely:可爱 excellent:优秀 wonderful:精彩 pleasant:舒服 perfect:完美 charming:迷人"
)
BLAME = _words("bad:很差 awful:糟糕 terrible:可怕 boring:无聊 horrible:恶心 ugly:难看 poor:劣质 nasty:讨厌")


class Series(NamedTuple):
    """Films that are watched in this order, round and round: that is the taste to be learned."""

    genre: str
    titles: tuple[str, ...]


SERIES = (
    Series("space", ("Star Gate", "Moon Base", "Dark Comet", "Red Planet", "Solar Wind", "Lost Orbit")),
    Series("crime", ("Night Thief", "Cold Case", "Black Letter", "Silent Witness", "Stolen Ring", "Hidden Room")),
    Series("nature", ("Deep Ocean", "Green Valley", "High Peaks", "Wild Rivers", "Quiet Desert", "Frozen North")),
    Series("music", ("Blue Piano", "First Violin", "Jazz Nights", "Golden Voice", "Slow Waltz", "Street Drums")),
)


@dataclass(frozen=True, slots=True)
class Pool:
    """The words a text may be made of (colours, verbs, places and aspects are always all of them)."""

    people: tuple[Word, ...]
    things: tuple[Thing, ...]
    praise: tuple[Word, ...]
    blame: tuple[Word, ...]
    series: tuple[Series, ...]


_LATE_THINGS = THINGS[4::5]
EVERY = Pool(PEOPLE, THINGS, PRAISE, BLAME, SERIES)
SEEN = Pool(PEOPLE[:12], tuple(t for t in THINGS if t not in _LATE_THINGS), PRAISE[:6], BLAME[:6], SERIES[:3])
# With late people only there would be too few contents; a late thing, adjective or series is what makes a prompt late.
LATE = Pool(PEOPLE, _LATE_THINGS, PRAISE[6:], BLAME[6:], SERIES[3:])
NOVEL = Pool(NOVEL_PEOPLE, SEEN.things, SEEN.praise, SEEN.blame, SEEN.series)
LATE_WORDS = (*PEOPLE[12:], *(Word(t.en, t.zh) for t in _LATE_THINGS), *PRAISE[6:], *BLAME[6:])


def is_held_out(*words: str) -> bool:
    """Say whether content made of these English words is reserved for evaluation: the same answer on every machine."""
    return zlib.crc32("|".join(words).encode("utf-8")) % HELD_OUT_ONE_IN == 0


def draw_triple(
    rng: random.Random, people: Sequence[Word], things: Sequence[Thing], held_out: bool
) -> tuple[Word, Word, Thing]:
    """Return a random (person, colour, thing) that is held out or, for everything trained on, is not."""
    while True:
        person, colour, thing = rng.choice(people), rng.choice(COLOURS), rng.choice(things)
        if is_held_out(person.en, colour.en, thing.en) == held_out:
            return person, colour, thing


def with_article(noun: str) -> str:
    """Return "a ball", "an animal"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listing(items: list[str], language: int) -> str:
    """Join as "x, y and z" or "x、y、z"."""
    if language == ZH:
        return "、".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]
