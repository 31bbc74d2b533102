"""One token for each row: from states through the head, or from logits."""

from pallas_kernels.sample.op import SampleOutput as SampleOutput
from pallas_kernels.sample.op import SamplingTensors as SamplingTensors
from pallas_kernels.sample.op import Vocabulary as Vocabulary
from pallas_kernels.sample.op import filter_thresholds as filter_thresholds
from pallas_kernels.sample.op import lm_head_sample as lm_head_sample
from pallas_kernels.sample.op import sample_logits as sample_logits
