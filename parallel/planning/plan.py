"""The plan: what will run, where, and what it costs, decided before anything starts.

A frozen value, JSON both ways. Nothing in it is "auto": every rank reads the same file and compares digests. Does not
know how it was chosen (`planner`), only why, in words.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .shards import Mesh, part
from .spec import Spec, spec_from_json, spec_to_json

DType = Literal["bf16", "fp16", "fp32", "fp64"]
KvDType = Literal["bf16", "fp16", "fp32", "fp64", "fp8"]  # fp8: e4m3, as the numbers are, without scales
DTYPE_BYTES: dict[KvDType, int] = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "fp8": 1}

Workload = Literal["latency", "throughput"]
# plain: torch's own operations, on any device. cpu: the same but for experts, and products with weights in bf16 or int8
# that are in fp32, which are C++ of ours; cpu-int8: and experts round activations to 8 bits.
Kernels = Literal["triton", "plain", "cpu", "cpu-int8"]


Misses = Literal["copied", "computed"]
# What attention's matrices, the embedding and the head are kept in. bf16: as the checkpoint has them, or in the compute
# dtype where kernels read no other. fp8 (e4m3), int8: with a scale for each output row.
Rest = Literal["bf16", "fp8", "int8"]
Kept = Literal["bf16", "fp8", "int8"] | None  # the same, but for None: in the compute dtype
REST_KL = 0.05  # nats: the most by which answers may differ for it, unless asked otherwise


def kept(rest: Rest, dtype: DType, kernels: Kernels) -> Kept:
    """The CPU's own kernels read bf16 in products of fp32, which makes no difference to them but half of the bytes."""
    if rest != "bf16":
        return rest
    return "bf16" if dtype == "fp32" and kernels in ("cpu", "cpu-int8") else None


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank will hold, by part. All but host_bytes are on the rank's device (host memory if the device is
    the CPU); host_bytes is what it keeps in host memory besides.

    rank: of the whole world: rank r of replica d is d * ranks + r.
    """

    rank: int
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    graphs_bytes: int  # CUDA graphs
    communication_bytes: int  # NCCL and the buffers of symmetric memory; 0 for a replica of one rank
    context_bytes: int  # CUDA context, loaded kernels, cuBLAS workspace
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        """The sum of all parts on the device."""
        on_device = self.weights_bytes + self.kv_bytes + self.workspace_bytes
        return on_device + self.graphs_bytes + self.communication_bytes + self.context_bytes


@dataclass(frozen=True)
class Way:
    """One way to run a model whose experts do not all fit on the device, and what it costs.

    slots: experts of each layer that the device keeps. The others are kept in host memory, or only in the checkpoint's
    file, which is mapped. misses: those that a token needs and the device has not are copied to it, in place of the one
    unused for longest; or computed on the CPU, and then which ones the device keeps never changes. host_bytes: of
    experts in host memory. The rest is expected for each token of a single stream: bytes that the device reads, that go
    over the link, that the CPU reads, and that come from disk, and tokens a second.
    """

    device: Literal["cuda", "cpu"]
    slots: int
    kept: Literal["memory", "file"]
    misses: Misses
    host_bytes: int
    device_read_bytes: float
    link_bytes: float
    cpu_read_bytes: float
    disk_bytes: float
    tok_s: float

    @property
    def name(self) -> str:
        where = "host memory" if self.kept == "memory" else "the file"
        if self.device == "cpu":
            return f"all on the CPU, experts in {where}"
        return f"{self.slots} experts a layer on the GPU, others {self.misses} from {where}".replace(
            "computed from", "computed by the CPU from"
        )


@dataclass(frozen=True)
class Offload:
    """The way that was taken, and those that were not. hot: for each layer the experts that the device keeps from the
    start, the most used first; () where nothing is known of their use: the first ones. ahead: of the next layer's
    experts that the device has not, so many are copied before that layer says which it needs, as its router would
    choose from what this layer's experts are given."""

    taken: Way
    others: tuple[Way, ...]
    hot: tuple[tuple[int, ...], ...] = ()
    ahead: int = 0


@dataclass(frozen=True)
class Plan:
    """One resolved plan. `ep` divides `ranks`; a replica is `ranks` ranks, `dp` the number of replicas.

    Replicas are spread over the nodes as `shards.part` spreads units; where there are fewer of them than nodes, the
    ranks of each are spread so over its `span` nodes. Replica i of a node takes its GPUs from i * ranks on, in the
    order in which the machine shows them.
    """

    model: str  # as the user named it
    checkpoint: str | None  # folder with the weights; None when only planning
    spec: Spec
    machine: str
    device: Literal["cuda", "cpu"]
    dp: int
    ranks: int
    ep: int
    dtype: DType  # of matrix products and attention weights
    residual_dtype: DType  # of the hidden state between layers
    kv_dtype: KvDType
    kernels: Kernels
    offload: Literal["none"] | Offload
    context_tokens: int  # longest sequence, prompt and answer together
    sequences: int  # most of them that run at the same time in one replica; others wait
    kv_tokens: int  # tokens of KV cache that full-attention layers can hold, over all sequences of a replica
    page_tokens: int  # tokens in one KV page
    step_tokens: int  # most tokens in one forward pass: longer prompts go in chunks
    memory: tuple[RankMemory, ...]  # a row for each rank of the world
    why: tuple[str, ...]
    workload: Workload = "latency"  # what the layout was chosen for
    nodes: int = 1  # that replicas are spread over
    # For each layer, the experts in the order that the ep cut slices; () where that is the published order.
    expert_order: tuple[tuple[int, ...], ...] = ()
    rest: Rest = "bf16"
    rest_kl: float = REST_KL  # refused at the start where the mean KL divergence from bf16, in nats, is more

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.ranks, self.ep)

    @property
    def kept(self) -> Kept:
        """What the rest really is kept in."""
        return kept(self.rest, self.dtype, self.kernels)

    @property
    def world_size(self) -> int:
        return self.dp * self.ranks

    @property
    def span(self) -> int:
        """Nodes that one replica lies on."""
        return max(1, self.nodes // self.dp)

    def replicas_of(self, node: int) -> range:
        """The replicas that run on this node, counted from 0; or the one that has some of its ranks there."""
        own = part(self.dp, 1, node // self.span, self.nodes // self.span)
        return range(own.start, own.stop)

    def ranks_of(self, node: int) -> range:
        """Those that run on this node, of each replica there, counted from 0 in the replica."""
        own = part(self.ranks, 1, node % self.span, self.span)
        return range(own.start, own.stop)

    def gpus_of(self, node: int) -> int:
        """How many GPUs this node needs."""
        return len(self.replicas_of(node)) * len(self.ranks_of(node)) if self.device == "cuda" else 0

    @property
    def digest(self) -> str:
        """8 hex characters over the whole plan; ranks compare it before the first step."""
        canonical = json.dumps(self._fields(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def _fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"spec": spec_to_json(self.spec), "why": list(self.why)}

    def to_json(self) -> dict[str, Any]:
        """Every field, and the derived ones that programs read: digest, tp, etp, world_size."""
        derived = {
            "digest": self.digest,
            "tp": self.mesh.tp,
            "etp": self.mesh.etp,
            "world_size": self.world_size,
        }
        return derived | self._fields()

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Plan":
        """Reads what `to_json` wrote; raises UserError if the digest says that the text was changed."""
        names = {field.name for field in dataclasses.fields(Plan)}
        kept = {name: value for name, value in fields.items() if name in names}
        plan = Plan(
            **kept
            | {
                "spec": spec_from_json(kept["spec"]),
                "memory": tuple(RankMemory(**row) for row in kept["memory"]),
                "why": tuple(kept["why"]),
                "expert_order": tuple(tuple(order) for order in kept["expert_order"]),
                "offload": _offload(kept["offload"]),
            }
        )
        if plan.digest != fields["digest"]:
            raise UserError(f"plan {fields['digest']} was edited: its digest is now {plan.digest}", "plan again")
        return plan

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Plan":
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))


def _offload(fields: Any) -> Any:
    if not isinstance(fields, dict):
        return fields
    others = tuple(Way(**way) for way in fields["others"])
    hot = tuple(tuple(layer) for layer in fields["hot"])
    return Offload(Way(**fields["taken"]), others, hot, fields["ahead"])
