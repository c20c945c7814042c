"""DDP, FSDP2 and tensor parallelism: two gloo processes train as one does, with our layers and with PEFT's."""

from __future__ import annotations

import copy
import datetime
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn

if not dist.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    LinearWithLoRA,
    adapters,
    bases,
    formulas,
    freeze_base,
    load_adapter,
    lora_linear,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    save_adapter,
)
from lora_kernels.distributed import ColwiseLoRA, RowwiseLoRA, register
from lora_kernels.integrations import peft as integration

ROOT = Path(__file__).parent.parent
RANKS = 2


def network(bias=True, frozen=True, dtype=torch.float64, dora=False):
    torch.manual_seed(3)
    net = nn.Sequential(
        LinearWithLoRA(nn.Linear(8, 12, bias=bias), 3, 0.5, dora=dora),
        nn.ReLU(),
        LinearWithLoRA(nn.Linear(12, 6, bias=bias), 3, 2.0, dora=dora),
    )
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.lora.B)
    if frozen:
        freeze_base(net)
    return net.to(dtype)


def batch(dtype=torch.float64):
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(5), dtype=dtype)


def gradients(net):
    """Every gradient, whole."""
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in net.named_parameters()
        if p.grad is not None
    }


def single(net, x):
    """The gradients on one process. Loss is the mean over ranks of each rank's own sum, as data parallelism averages."""
    whole = copy.deepcopy(net)
    (whole(x).square().sum() / RANKS).backward()
    return gradients(whole)


def own_step(net, x):
    """y of this rank's samples, and its backward."""
    y = net(x.chunk(RANKS)[dist.get_rank()])
    y.square().sum().backward()
    return y


def shard(net, layers, **options):
    """FSDP2 around the first and the last of the layers, and around the whole."""
    for module in (layers[0], layers[2], net):
        fully_shard(module, **options)


def assert_equal(actual, expected):
    assert expected
    torch.testing.assert_close(actual, expected)


def assert_near(actual, expected):
    """As sums of two ranks' bfloat16 gradients are."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).float().norm() / gradient.float().norm()
        assert difference < 0.02, (name, difference)


def check_ddp(frozen):
    net, x = network(frozen=frozen), batch()
    expected = single(net, x)
    own_step(nn.parallel.DistributedDataParallel(net), x)
    assert_equal(gradients(net), expected)


def count_fused(patch):
    """A list that grows with every fused product that a layer asks for."""
    calls = []
    patch.setattr(bases, "lora_linear", lambda *a, **kw: calls.append(1) or lora_linear(*a, **kw))
    return calls


def check_fsdp(patch, frozen):
    net, x = network(frozen=frozen), batch()
    expected = single(net, x)
    calls = count_fused(patch)
    shard(net, net)
    own_step(net, x)
    assert_equal(gradients(net), expected)
    assert type(net[0].lora.A).__name__ == "DTensor" and len(calls) == 2


def check_dora_under_fsdp():
    """Weights that are gathered anew for each step, and changed between two: their norms are those of the moment."""
    net, x = network(dora=True), batch()
    whole = copy.deepcopy(net)
    shard(net, net)
    for _ in range(2):
        own_step(net, x)
        assert_equal(gradients(net), single(whole, x))
        net.zero_grad()
        for each in (whole, net):
            with torch.no_grad():
                for layer in (each[0], each[2]):
                    layer.linear.weight.mul_(2.0)
                    layer.lora.B.add_(1.0)


def check_fsdp_mixed_precision():
    net, x = network(dtype=torch.float32), batch(torch.float32)
    expected = single(copy.deepcopy(net).bfloat16(), x.bfloat16())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(net, net, mp_policy=policy)
    assert own_step(net, x).dtype == torch.bfloat16
    found = gradients(net)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert_near(found, expected)


def check_peft_under_fsdp(patch):
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    net, x = get_peft_model(base, config).double(), batch()
    expected = single(net, x)
    integration.accelerate(net)
    calls = count_fused(patch)
    shard(net, net.base_model.model)
    own_step(net, x)
    assert_equal(gradients(net), expected)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="must be restored before it is sharded"):
        integration.restore(net)


def quantised_network(peft):
    """NF4 layers in bfloat16: the dtype of the storage, of the bias and of the adapters, as FSDP2 wants."""
    import bitsandbytes as bnb

    torch.manual_seed(3)

    def linear(K, N):
        half = {"compute_dtype": torch.bfloat16, "quant_storage": torch.bfloat16}
        made = bnb.nn.Linear4bit(K, N, quant_type="nf4", **half).to(torch.bfloat16).to("cpu")
        return made.requires_grad_(False)

    net = nn.Sequential(linear(64, 96), nn.ReLU(), linear(96, 32))
    if not peft:
        for index in (0, 2):
            net[index] = LinearWithLoRA(net[index], 3, 0.5)
            nn.init.normal_(net[index].lora.B)
        return net
    net.is_loaded_in_4bit = True
    config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    assert len(integration.accelerate(model).fused) == 2
    return model


def check_quantised(patch, peft, sharded):
    net = quantised_network(peft)
    # Each rank has more than 16 rows: fewer are multiplied by a W that is not rounded to bfloat16.
    x = torch.randn(4, 20, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = single(net, x)
    calls = count_fused(patch)
    if sharded:
        shard(net, net.base_model.model if peft else net)
    own_step(net if sharded else nn.parallel.DistributedDataParallel(net), x)
    found = gradients(net)
    assert len(found) == 4 and len(calls) == 2
    assert_near(found, expected)


def check_tensor_parallel(bias, frozen):
    net = network(bias, frozen)
    sharded = copy.deepcopy(net)
    parallelize_module(sharded, mesh(), {"0": ColwiseLoRA(), "2": RowwiseLoRA()})
    x, sharded_x = (batch().requires_grad_() for _ in range(2))
    y, sharded_y = net(x), sharded(sharded_x)
    torch.testing.assert_close(sharded_y, y)
    y.square().sum().backward()
    sharded_y.square().sum().backward()
    torch.testing.assert_close(sharded_x.grad, x.grad)
    assert_equal(gradients(sharded), gradients(net))
    for p in sharded.parameters():
        assert p.grad is None or p.grad.placements == p.placements
    assert sharded[0].linear.weight.to_local().shape == (12 // RANKS, 8)
    assert sharded[2].lora.A.to_local().shape == (12 // RANKS, 3)


def check_tensor_parallel_products(monkeypatch):
    """A rank computes on its shards: one fused product of the local sizes for a layer, nothing gathered before."""
    seen = []
    forward = formulas.forward

    def record(backend, x, weight, *rest):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return forward(backend, x, weight, *rest)

    net = network()
    parallelize_module(net, mesh(), {"0": ColwiseLoRA(), "2": RowwiseLoRA()})
    monkeypatch.setattr(formulas, "forward", record)
    net(batch())
    assert seen == [((20, 8), (6, 8)), ((20, 6), (6, 6))]


def check_sharded_rows():
    """DTensors by hand: rows of x are sharded, all else is whole, and dA, dB and dbias are summed."""
    register()
    layer = network(frozen=False)[0]
    x = batch().flatten(0, 1)
    operands = [x, layer.weight, layer.lora.A, layer.lora.B, layer.bias]
    local = [t.detach().clone().requires_grad_() for t in operands]
    placements = [Shard(0), *[Replicate()] * 4]
    remote = [
        distribute_tensor(t.detach().clone(), mesh(), [p]).requires_grad_()
        for t, p in zip(operands, placements, strict=True)
    ]
    y = lora_linear(*local[:4], 0.5, local[4])
    sharded = lora_linear(*remote[:4], 0.5, remote[4])
    assert sharded.placements == (Shard(0),)
    torch.testing.assert_close(sharded.full_tensor(), y)
    y.square().sum().backward()
    sharded.square().sum().backward()
    for ours, theirs in zip(remote, local, strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def in_fsdp(net):
    """FSDP2 in one group, whose parameters stay whole after a forward without gradients."""
    fully_shard(net, mesh=mesh())
    with torch.no_grad():
        net(batch())
    assert type(net[0].lora.A) is nn.Parameter


def in_tensor_parallel(net):
    parallelize_module(net, mesh(), {"0": ColwiseLoRA(), "2": RowwiseLoRA()})


def in_both(net):
    both = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, both["tensor"], {"0": ColwiseLoRA(), "2": RowwiseLoRA()})
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=both["data"])


def check_files(sharded, dora=False):
    """Sharded layers are saved whole by each rank, and loaded into all at once or not at all."""
    net, other, x = network(dora=dora), network(dora=dora), batch()
    with torch.no_grad():
        for parameter in lora_parameters(other):
            parameter.add_(0.1)
    other[0].lora.alpha = 3.0
    want = {name: lora_state_dict(each) for name, each in (("net", net), ("other", other))}
    sharded(net)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(net, f"{folder}/net")
        save_adapter(other, f"{folder}/other")
        plain = network(dora=dora)
        load_adapter(plain, f"{folder}/net")
        assert_equal(lora_state_dict(plain), want["net"])

        with pytest.MonkeyPatch.context() as broken:
            fill, calls = adapters.fill, []

            def fails_once(*args):
                calls.append(args)
                fill(*args)
                if len(calls) == 2:
                    raise KeyboardInterrupt

            broken.setattr(adapters, "fill", fails_once)
            with pytest.raises(KeyboardInterrupt):
                load_adapter(net, f"{folder}/other")
        assert_equal(whole_state(net), want["net"])
        with torch.no_grad():
            net(x)
        load_adapter(net, f"{folder}/other")
    assert_equal(whole_state(net), want["other"])
    for _ in range(2):  # after a step as well
        torch.testing.assert_close(net(x), other(x))
        net(x).sum().backward()
    assert_equal(whole_state(net), want["other"])


def whole_state(net):
    return {name: t.full_tensor() for name, t in lora_state_dict(net).items()}


def check_ddp_files():
    """The files of a model within DDP are those of the model."""
    net = network()
    wrapped = nn.parallel.DistributedDataParallel(net)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(wrapped, folder)
        fresh = network()
        load_adapter(fresh, folder)
        assert sorted(load_adapter(wrapped, folder)) == ["0", "2"]
    assert_equal(lora_state_dict(fresh), lora_state_dict(net))


def check_style_wants_our_layer():
    with pytest.raises(TypeError, match="module must be a LinearWithLoRA, got ReLU"):
        parallelize_module(network(), mesh(), {"1": ColwiseLoRA()})
    merged = network()
    merge_lora(merged)
    with pytest.raises(ValueError, match="module must not be merged"):
        parallelize_module(merged, mesh(), {"0": ColwiseLoRA()})
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    transposed = nn.Sequential(LinearWithLoRA(conv1d(4, 4), 2, 1.0))
    with pytest.raises(TypeError, match=r"over an nn\.Linear, got one over a Conv1D"):
        parallelize_module(transposed, mesh(), {"0": ColwiseLoRA()})


def check_checkpointing_under_ddp():
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    net, x = network(), batch()
    expected = single(net, x)
    own_step(nn.parallel.DistributedDataParallel(Checkpointed(net)), x)
    assert_equal(gradients(net), expected)


CHECKS = {
    "ddp-frozen": lambda patch: check_ddp(frozen=True),
    "ddp-trained-base": lambda patch: check_ddp(frozen=False),
    "ddp-checkpointed": lambda patch: check_checkpointing_under_ddp(),
    "fsdp-frozen": lambda patch: check_fsdp(patch, frozen=True),
    "fsdp-trained-base": lambda patch: check_fsdp(patch, frozen=False),
    "fsdp-dora": lambda patch: check_dora_under_fsdp(),
    "fsdp-mixed-precision": lambda patch: check_fsdp_mixed_precision(),
    "fsdp-peft": check_peft_under_fsdp,
    "ddp-nf4": lambda patch: check_quantised(patch, peft=False, sharded=False),
    "fsdp-nf4": lambda patch: check_quantised(patch, peft=False, sharded=True),
    "fsdp-nf4-peft": lambda patch: check_quantised(patch, peft=True, sharded=True),
    "tp": lambda patch: check_tensor_parallel(bias=True, frozen=True),
    "tp-trained-base": lambda patch: check_tensor_parallel(bias=True, frozen=False),
    "tp-without-bias": lambda patch: check_tensor_parallel(bias=False, frozen=True),
    "tp-local-products": check_tensor_parallel_products,
    "tp-rows": lambda patch: check_sharded_rows(),
    "ddp-files": lambda patch: check_ddp_files(),
    "fsdp-files": lambda patch: check_files(in_fsdp),
    "fsdp-files-dora": lambda patch: check_files(in_fsdp, dora=True),
    "tp-files": lambda patch: check_files(in_tensor_parallel),
    "fsdp-tp-files": lambda patch: check_files(in_both),
    "tp-other-layers": lambda patch: check_style_wants_our_layer(),
}


def mesh():
    return init_device_mesh("cpu", (RANKS,))


def _rank_main(rank, folder):
    """Every check in turn, on this rank; what failed is written to a file of the rank's own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-point",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=30),
    )
    outcome = {}
    for name, check in CHECKS.items():
        try:
            with pytest.MonkeyPatch.context() as patch:
                check(patch)
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
            break  # the ranks may wait for one another now
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank says of each check: one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("ranks")
    code = (
        f"import sys; from tests.test_distributed import _rank_main; "
        f"_rank_main(int(sys.argv[1]), {str(folder)!r})"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(rank)], cwd=ROOT)
        for rank in range(RANKS)
    ]
    try:
        for process in ranks:
            process.wait(timeout=180)
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(outcomes, name):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(name, "was not reached") is None, f"rank {rank}: {outcome.get(name)}"
