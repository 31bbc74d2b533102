"""One token for each row: from states through the head, or from logits."""

from pallas_kernels.sample.op import Drawn as Drawn
from pallas_kernels.sample.op import Rows as Rows
from pallas_kernels.sample.op import Vocabulary as Vocabulary
from pallas_kernels.sample.op import draw as draw
from pallas_kernels.sample.op import head as head
from pallas_kernels.sample.op import thresholds as thresholds
