"""One sampled token per row: from hidden states through the head, or from logits."""

from pallas_kernels.sample.op import filter_thresholds as filter_thresholds
from pallas_kernels.sample.op import lm_head_sample as lm_head_sample
from pallas_kernels.sample.op import sample_logits as sample_logits
from pallas_kernels.sample.types import SampleOutput as SampleOutput
from pallas_kernels.sample.types import SamplingTensors as SamplingTensors
from pallas_kernels.sample.types import Vocabulary as Vocabulary
