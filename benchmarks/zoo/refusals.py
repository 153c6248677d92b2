"""The kinds of refusal, told by their words.

"cannot cut at 'layers.3': the layers before and after it share 'embed.weight', ..." is a `shared parameter`. Only the
first kind whose words occur counts; what fits none is `other`, which should be looked at.
"""

from __future__ import annotations

SHARED = "both halves read a parameter"

KINDS: tuple[tuple[str, str], ...] = (
    ("can neither", "a side value can neither run nor be kept"),
    ("belongs to none of them", "a part of the output depends on all objects"),
    ("how far the others pad it", "objects of several sizes in one batch"),
    ("depends on the other objects", "a row depends on the rest of the batch"),
    ("gives other values each time", "the prefix is random in eval mode"),
    ("share='freeze'", SHARED),
    ("LayerDrop", "layers run in another order each time"),
    ("runs other layers", "other layers for another size"),
    ("reentrant checkpoint", "checkpoint region across the cut"),
    ("checkpoint region", "checkpoint region across the cut"),
    ("times in one forward", "the module is called several times"),
    ("never calls it", "the module is never called"),
    ("holds no tensor", "the output holds no tensor"),
    ("no dimension that counts the objects", "the output has no dimension for the objects"),
    ("two dimensions that count the objects", "the output has two dimensions for the objects"),
    ("more than one way", "the output follows the sequence in two dimensions"),
    ("by no law", "the output's size follows no law"),
    ("depends on the batch", "nothing before it depends on the batch"),
    ("reaches the output", "a skipped value reaches the output"),
    ("reads a value", "a skipped value is read"),
    ("would have computed", "a skipped value is read"),
    ("with the layers before it skipped", "the model fails without its prefix"),
    ("leaves something behind", "the model fails without its prefix"),
    ("once more after the cut", "a prefix module is called again"),
    ("gradient of", "a gradient would differ"),
    ("must count the objects", "an input has no dimension for the objects"),
    ("does not run on the example", "the model does not run on two objects"),
    ("draws random numbers", "glue before the cut is random in training"),
    ("in training mode", "training mode takes another way"),
    ("do not compute what", "the halves would differ"),
    ("differs by", "the halves would differ"),
    ("another size than those of the example", "rows of another size than the example's"),
    ("needs what was skipped", "a skipped value is read"),
)


def kind_of(message: str) -> str:
    """The kind of a refusal."""
    return next((kind for words, kind in KINDS if words in message), "other")
