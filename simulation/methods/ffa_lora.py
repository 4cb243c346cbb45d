"""FFA-LoRA (Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024).

FedIT with A frozen at its initial values; only B is trained, sent and averaged. The mean of the products B·A is then
the product of the means. The head is trained and averaged, too. We could not check what the paper does with a new head.
"""

from __future__ import annotations

from fedfmsl.protocol.layout import Slot
from simulation.methods.fedit import FedIT
from simulation.methods.local_training import is_lora_a


class FFALoRA(FedIT):
    name = "ffa-lora"
    title = "FFA-LoRA"
    source = "Sun et al., ICLR 2024"

    def is_trained(self, slot: Slot) -> bool:
        return not is_lora_a(slot)
