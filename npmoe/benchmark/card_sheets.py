"""Cards as their data sheets and NVIDIA's programming guide describe them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from npmoe.errors import RangeError


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSheet:
    """What a modelled bound needs to know of a card; nothing of it was measured here.

    Attributes
    ----------
    name, arch : str
    multiprocessors : int
    clock : float
        Boost clock, Hz.
    tensor_clock : float
        The clock at which the sheet's tensor rate holds.
    float32_fma : int
        Multiply-adds per clock and multiprocessor.
    tensor_fma : int
        The same of dense bfloat16 or float16 with float32 sums; tf32 has half of it.
    mma_sync_share : float or None
        The share of `tensor_fma` that mma.sync, the instruction of these kernels, has been
        measured to reach; 1.0 where no other instruction is faster; None if it is known to be
        less, and by how much is not published.
    memory : float
        Bytes per second.
    l2 : int
        Bytes.
    threads, blocks, shared : int
        Most resident threads, blocks and bytes of shared memory of a multiprocessor.
    source : str

    Notes
    -----
    Rates follow from the sheets' peaks: 312 TFLOP/s = 2 * 108 * 1024 * 1.41 GHz (A100), 71.2 and
    165.2 and 209.5 = 2 * (82, 128, 170) * 256 * clock (RTX 3090, 4090, 5090), 989.4 = 2 * 132 *
    2048 * 1.83 GHz (H100), 2250 = 2 * 148 * 4096 * 1.856 GHz (B200).

    On sm_90 the full rate needs wgmma, on sm_100 tcgen05.

    References
    ----------
    Compute capabilities: CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability". H100's mma.sync: Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper
    GPU Architecture", 62.9 % of the peak on average.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    tensor_clock: float
    float32_fma: int
    tensor_fma: int
    mma_sync_share: float | None
    memory: float
    l2: int
    threads: int
    blocks: int
    shared: int
    source: str

    @property
    def note(self) -> str:
        """Say what mma.sync cannot reach."""
        if self.mma_sync_share is None:
            return (
                f"mma.sync cannot reach the full tensor rate of {self.arch}; by how much is not "
                "published, and the bound assumes the full rate"
            )
        if self.mma_sync_share < 1.0:
            return (
                f"mma.sync reaches {self.mma_sync_share:.1%} of the full tensor rate of "
                f"{self.arch} (Luo et al. 2024), which the bound assumes"
            )
        return ""


_MIB = 2**20
_KIB = 2**10
_SHEETS = (
    CardSheet(
        name="A100", arch="sm_80", multiprocessors=108, clock=1.410e9, tensor_clock=1.410e9,
        float32_fma=64, tensor_fma=1024, mma_sync_share=1.0, memory=2.039e12, l2=40 * _MIB,
        threads=2048, blocks=32, shared=164 * _KIB,
        source="NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB",
    ),
    CardSheet(
        name="RTX3090", arch="sm_86", multiprocessors=82, clock=1.695e9, tensor_clock=1.695e9,
        float32_fma=128, tensor_fma=256, mma_sync_share=1.0, memory=936e9, l2=6 * _MIB,
        threads=1536, blocks=16, shared=100 * _KIB,
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper",
    ),
    CardSheet(
        name="RTX4090", arch="sm_89", multiprocessors=128, clock=2.520e9, tensor_clock=2.520e9,
        float32_fma=128, tensor_fma=256, mma_sync_share=1.0, memory=1008e9, l2=72 * _MIB,
        threads=1536, blocks=24, shared=100 * _KIB,
        source="NVIDIA Ada GPU Architecture whitepaper",
    ),
    CardSheet(
        name="H100", arch="sm_90", multiprocessors=132, clock=1.980e9, tensor_clock=1.830e9,
        float32_fma=128, tensor_fma=2048, mma_sync_share=0.629, memory=3.35e12, l2=50 * _MIB,
        threads=2048, blocks=32, shared=228 * _KIB,
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM; Hopper whitepaper",
    ),
    CardSheet(
        name="B200", arch="sm_100", multiprocessors=148, clock=1.965e9, tensor_clock=1.856e9,
        float32_fma=128, tensor_fma=4096, mma_sync_share=None, memory=8.0e12, l2=126 * _MIB,
        threads=2048, blocks=32, shared=228 * _KIB,
        source="NVIDIA DGX B200 data sheet, an eighth of it; clock, L2 and SMs as devices report",
    ),
    CardSheet(
        name="RTX5090", arch="sm_120", multiprocessors=170, clock=2.407e9, tensor_clock=2.407e9,
        float32_fma=128, tensor_fma=256, mma_sync_share=1.0, memory=1.792e12, l2=96 * _MIB,
        threads=1536, blocks=24, shared=100 * _KIB,
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper",
    ),
)  # fmt: skip
CARD_SHEETS = {sheet.name: sheet for sheet in _SHEETS}


def find_sheet(name: str) -> CardSheet:
    """Return a card by its name; spaces, hyphens and case do not matter.

    Raises
    ------
    RangeError
        For an unknown name, with the known ones.

    Examples
    --------
    >>> find_sheet("RTX 4090").arch
    'sm_89'
    """
    known = {known.lower(): sheet for known, sheet in CARD_SHEETS.items()}
    plain = name.lower().replace(" ", "").replace("-", "")
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, n=1)
    hint = f" Did you mean {known[near[0]].name!r}?" if near else ""
    raise RangeError(
        f"bench: --modelled must name known cards, got {name!r}.{hint} "
        f"Known: {', '.join(CARD_SHEETS)}."
    )
