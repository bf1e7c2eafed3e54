"""Are bytes by ZeRO level those of the paper, and is the peak the larger of two moments?"""

from dataclasses import replace

import pytest

from train.planning.memory import (
    Bytes,
    Memory,
    Sharding,
    lora_parameters,
    model_states,
    with_activations,
)

MIXED = Bytes(weight=2, gradient=2, master=4, states=8)
BILLION = 10**9


def sharding(gpus: int, level: int, **changes) -> Sharding:
    return replace(Sharding("deepspeed", gpus, level), **changes)


def test_sixteen_bytes_for_each_parameter():
    assert MIXED.trained == 16


@pytest.mark.parametrize(
    ("billions", "gpus", "level", "gigabytes"),
    [  # table 1 of the ZeRO paper
        (7.5, 1, 0, 120),
        (7.5, 4, 1, 52.5),
        (7.5, 4, 2, 41.3),
        (7.5, 4, 3, 30),
        (7.5, 16, 1, 35.6),
        (7.5, 16, 2, 21.6),
        (7.5, 16, 3, 7.5),
        (7.5, 64, 1, 31.4),
        (7.5, 64, 2, 16.6),
        (7.5, 64, 3, 1.88),
        (128, 1024, 1, 513),
        (128, 1024, 2, 257),
        (128, 1024, 3, 2),
        (1000, 1024, 1, 4011),
        (1000, 1024, 2, 2013),
        (1000, 1024, 3, 15.6),
    ],
)
def test_the_papers_table(billions, gpus, level, gigabytes):
    memory = model_states(int(billions * BILLION), 0, MIXED, sharding(gpus, level))
    states = memory.weights + memory.gradients + memory.optimizer
    assert states / 1e9 == pytest.approx(gigabytes, rel=0.006)


def test_what_is_frozen_keeps_its_weights_alone():
    memory = model_states(0, BILLION, MIXED, sharding(8, 2))
    assert (memory.weights, memory.gradients, memory.optimizer) == (2e9, 0, 0)
    assert model_states(0, BILLION, MIXED, sharding(8, 3)).weights == 2e9 / 8


def test_data_parallelism_copies_gradients_into_buckets():
    alone = model_states(BILLION, 0, MIXED, Sharding("ddp", 1, 0))
    together = model_states(BILLION, 0, MIXED, Sharding("ddp", 2, 0))
    assert (alone.buffers, together.buffers) == (0, 2e9)


def test_zero_3_gathers_a_part_of_the_weights():
    memory = model_states(BILLION, 0, MIXED, sharding(8, 3, live=BILLION // 4, bucket=1000))
    assert memory.buffers == 5e8 + 2000
    small = model_states(1000, 0, MIXED, sharding(8, 3, live=BILLION, bucket=BILLION))
    assert small.buffers == 2 * 1000 + 2 * 1000  # never more than there is


@pytest.mark.parametrize(
    ("optimizer", "parameters", "gpu", "host"),
    [(False, False, (2, 2, 12), 0), (True, False, (2, 0, 0), 14 + 4), (True, True, (0, 0, 0), 20)],
)
def test_offload_moves_bytes_to_the_host(optimizer, parameters, gpu, host):
    choice = sharding(1, 3, offload_optimizer=optimizer, offload_parameters=parameters)
    memory = model_states(BILLION, 0, replace(MIXED, step=4), choice)
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(n * 1e9 for n in gpu)
    assert memory.host == host * 1e9


def test_the_peak_is_in_the_backward_pass_or_in_the_step():
    memory = Memory(1, 2, 3, 4, activations=10, step=20, reserve=5, host=7)
    assert memory.total == 15 + 20
    assert replace(memory, activations=30).total == 15 + 30


def test_gradients_that_come_as_activations_go_are_not_counted_twice():
    states = Memory(10, 6, 12, 0, activations=0, step=0, reserve=0, host=0)
    # 9 bytes of activations alone; 11 with the gradients that are there by then
    assert with_activations(states, 9, 11, gradients_stay=True, reserve=1).total == 29 + 9
    assert with_activations(states, 9, 11, gradients_stay=False, reserve=1).total == 23 + 11
    # at the end all gradients are there: never less than that
    assert with_activations(states, 0, 6, gradients_stay=False, reserve=0).total == 28


@pytest.mark.parametrize(
    ("engine", "changes", "name"),
    [
        ("deepspeed", {}, "ZeRO-2"),
        ("deepspeed", {"offload_optimizer": True}, "ZeRO-2, optimizer on the host"),
        ("fsdp", {}, "FSDP"),
    ],
)
def test_names(engine, changes, name):
    assert replace(Sharding(engine, 8, 2), **changes).name == name


def test_lora_of_a_linear_layer():
    assert lora_parameters([(4096, 11008), (4096, 4096)], 16) == 16 * (4096 + 11008 + 2 * 4096)
