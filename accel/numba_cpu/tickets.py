"""What threads of a kernel share: tickets for tasks, counters of stages."""

from __future__ import annotations

import os

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import I32, I64, data_pointer

INT = types.int64


@intrinsic
def take_ticket(context, tickets):
    """Return tickets[0] and add one to it, as one step for all threads."""
    signature = INT(tickets)

    def generate(context, builder, signature, args):
        pointer = data_pointer(context, builder, tickets, args[0])
        return builder.atomic_rmw("add", pointer, I64(1), "monotonic")

    return signature, generate


@intrinsic
def finish_task(context, tickets, stage):
    """Count a task of a stage as done, after all that it wrote."""
    signature = types.void(tickets, INT)

    def generate(context, builder, signature, args):
        counters = data_pointer(context, builder, tickets, args[0])
        counter = builder.gep(counters, [builder.add(args[1], I64(1))])
        builder.atomic_rmw("add", counter, I64(1), "release")
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def wait_for_stage(context, tickets, stage, count):
    """Return when `count` tasks of a stage are done; what they wrote can be read then."""
    signature = types.void(tickets, INT, INT)

    def generate(context, builder, signature, args):
        counters = data_pointer(context, builder, tickets, args[0])
        counter = builder.gep(counters, [builder.add(args[1], I64(1))])
        look, wait, go_on = (builder.append_basic_block(n) for n in ("look", "wait", "go_on"))
        builder.branch(look)
        builder.position_at_end(look)
        done = builder.load_atomic(counter, "acquire", 8)
        builder.cbranch(builder.icmp_signed("<", done, args[2]), wait, go_on)
        builder.position_at_end(wait)
        if os.name == "posix":  # else it spins: a thread without a core needs this one's
            give_way = ir.FunctionType(I32, [])
            builder.call(
                cgutils.get_or_insert_function(builder.module, give_way, "sched_yield"), []
            )
        builder.branch(look)
        builder.position_at_end(go_on)
        return context.get_dummy_value()

    return signature, generate
