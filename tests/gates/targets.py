"""The compilers: TPU v5e through libtpu, H200 through the CUDA plugin, and jax.export for both. No device is needed."""

import importlib.util
import os
import pathlib
from typing import Any

import jax
from jax import export
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from tests.gates.programs import Program

HERE = pathlib.Path(__file__).parent


def prepare_environment() -> None:
    """To be called before jax compiles anything: run on the CPU, find ptxas, ask no metadata server."""
    jax.config.update("jax_platforms", "cpu")
    tpu = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in tpu.items():
        os.environ.setdefault(name, value)
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        cuda = pathlib.Path(root, "cu13")
        if cuda.is_dir():
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={cuda}".strip()
            os.environ["PATH"] = f"{cuda / 'bin'}{os.pathsep}{os.environ['PATH']}"


def tpu_devices() -> list[jax.Device]:
    """Four v5e chips that are not there."""
    return list(topologies.get_topology_desc("v5e:2x2", "tpu").devices)


def cuda_devices() -> list[jax.Device]:
    """One H200 that is not there, as h200.txtpb describes it."""
    text = (HERE / "h200.txtpb").read_text()
    return list(
        topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=text).devices
    )


def compile_for(program: Program, device: jax.Device) -> None:
    """Machine code for `device`, or for all of the program's mesh. Arguments that carry no sharding go there whole."""
    platform = "tpu" if device.platform == "tpu" else "cuda"
    mesh = program.mesh
    where = NamedSharding(mesh, PartitionSpec()) if mesh else SingleDeviceSharding(device)

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or where
        )

    arguments = jax.tree.map(place, program.arguments)
    with use_abstract_mesh(mesh.abstract_mesh if mesh else lone_mesh(device)):
        traced = jax.jit(program.function).trace(*arguments)
        traced.lower(lowering_platforms=(platform,)).compile()


def lone_mesh(device: jax.Device) -> AbstractMesh:
    """What Pallas' lowering looks at to know the chip; programs of plain XLA do not need it."""
    cores = getattr(device, "core_count", 1) if device.platform == "gpu" else 1
    chip = AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform=device.platform)
    return AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=chip)


def export_for_both(program: Program) -> None:
    """A StableHLO module for TPU and one for CUDA: the lowering rules, and nothing behind them.

    One module for both would lower the kernels of either platform for the other one too.
    """
    for platform in ("tpu", "cuda"):
        module = export.export(jax.jit(program.function), platforms=[platform])(*program.arguments)
        assert module.platforms == (platform,)
