"""The architectures on which LoRA must keep its laws, as tiny models with random weights."""

from tests.architectures.decoders import DECODERS
from tests.architectures.encoders import ENCODERS
from tests.architectures.entry import Architecture
from tests.architectures.experts import EXPERTS
from tests.architectures.plain import PLAIN
from tests.architectures.senses import SENSES

ARCHITECTURES: list[Architecture] = [*DECODERS, *EXPERTS, *ENCODERS, *SENSES, *PLAIN]
