"""Breaks the CUDA kernels in one place after another and shows that their tests on the CPU fail each time.

Run by ``make mutants``. Exit status 1 if a mutant survives. With an argument, only mutants with this
text in their name or file are made.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = [
    "tests/test_ops.py",
    "tests/test_cuda.py",
    "tests/test_stack.py",
    "tests/test_second_order.py",
    "-k",
    "test_plans_agree or test_tf32 or (test_ragged_shapes and bfloat16) or (test_a_wave and cluster)"
    " or (test_linear_ops and stepwise)",
]

KEEP = "a_row({} + lane() / 4) + k_of(i)"
SUMS = "cells.batch - 1)); }}, d.w_hh.row);\n    {}"
BACKWARD_MEETING = "meeting.arrive();\n        cells.fetch(s - 1);\n        meeting.wait();"
CLUSTER_SUMS = "{}\n      at.each(p.H, cells.batch,"
CLUSTER_SEND = "if (goes_on) {{\n        {}\n        const unsigned columns"
CLUSTER_DRH = "if (goes_on) {{\n        {}\n        const unsigned H"
CLUSTER_WAIT = "{}\n      float c[gates][1][4]"
WAVE_C = "= cells.h[e.i]; }});\n    {}"
SPLIT_SEND = "{}\n    inbox_.expect"
CLUSTER_START = "cells(p, d, at, p.range.first);\n    {}"


def swap(text: str, old: str, new: str) -> tuple[str, str]:
    return text.format(old), text.format(new)


MUTANTS = [
    ("no barrier before the sums are read", "stepwise.cuh", *swap(SUMS, "sync_block();", "")),
    ("no meeting between forward steps", "stepwise.cuh", "if (goes_on) meeting.arrive();", "if (goes_on) {}"),
    ("no meeting between backward steps", "stepwise.cuh", BACKWARD_MEETING, "cells.fetch(s - 1);"),
    ("a meeting doesn't wait", "stepwise.cuh", "wait_for(counter_, target_);", ";"),
    ("a meeting doesn't signal", "stepwise.cuh", "signal(counter_);", ";"),
    ("h goes to the buffer that is being read", "stepwise.cuh", "d.h[(cells.s + 1) % 2].at", "d.h[cells.s % 2].at"),
    ("two operands of mma swapped", "tile.cuh", "row_8.word[0], row.word[1]", "row.word[1], row_8.word[0]"),
    ("weights in shared memory lie on each other", "weights.cuh", "(i * count_ + m)", "(i + m)"),
    (
        "backward reads the wrong step",
        "stepwise.cuh",
        *swap("next_row = d.steps.rows(cells.s{}).first;", " + 1", ""),
    ),
    ("cluster: no barrier before the sums are read", "cluster.cuh", *swap(CLUSTER_SUMS, "sync_block();", "")),
    ("cluster: no barrier before h is sent", "cluster.cuh", *swap(CLUSTER_SEND, "sync_block();", "")),
    ("cluster: no barrier before drh is read", "cluster.cuh", *swap(CLUSTER_DRH, "sync_block();", "")),
    ("cluster: forward doesn't wait", "cluster.cuh", *swap(CLUSTER_WAIT, "inbox.receive();", "")),
    (
        "cluster: backward doesn't wait",
        "cluster.cuh",
        "if (s <= last && at.row < cells.next_batch) inbox.receive();",
        "",
    ),
    ("cluster: waits for the message before", "inbox.cuh", "(messages_ - 1) / 2", "(messages_ + 1) / 2"),
    ("cluster: starts before the mailboxes are open", "cluster.cuh", *swap(CLUSTER_START, "sync_cluster();", "")),
    (
        "cluster: h goes to the buffer that is being read",
        "cluster.cuh",
        *swap("to_h = h + {} * inbox", "inbox.buffer()", "(1 - inbox.buffer())"),
    ),
    ("cluster: drh goes where it may still be read", "cluster.cuh", "outbox + (s & 1) * outbox_vectors;", "outbox;"),
    (
        "cluster: has others' batch entries",
        "elements.cuh",
        "column < columns_before(rows_end)",
        "row + column < rows_end",
    ),
    ("cluster: expects too few bytes", "cluster.cuh", "mine * pairs * shape.blocks", "mine * pairs"),
    ("cluster: parts of dh go to the wrong place", "cluster.cuh", "rank * own_floats;", "0 * own_floats;"),
    (
        "cluster: a block that is alone doesn't meet",
        "inbox.cuh",
        *swap("if (alone_)\n      {}", "sync_block();", ";"),
    ),
    ("cluster: a block that is alone sends", "inbox.cuh", "alone_(blocks == 1)", "alone_(false)"),
    ("split: no barrier before the sums are sent", "stepwise.cuh", *swap(SPLIT_SEND, "sync_block();", "")),
    ("split: doesn't wait for the others' sums", "stepwise.cuh", "inbox_.receive();", ""),
    ("split: sums go to the wrong place", "stepwise.cuh", "part(rank(), m", "part(0, m"),
    ("split: all blocks have the first part of k", "stepwise.cuh", "smaller(Split::rank() * each, all)", "0"),
    ("large products ignore TF32", "products.cuh", "if (left && right &&", "if (false && left && right &&"),
    ("a transposed factor isn't turned", "products.cuh", "int(pitch), turned != 0}", "int(pitch), false}"),
    ("the wrong rows of the weights are kept", "tile.cuh", *swap(KEEP, "16 * m + 8 * half", "16 * m")),
    ("rows that start late lose their h0", "forward.cuh", "h0 && i < 2", "h0 && i < 1"),
    ("tangent: rh's own change is lost", "tangent.cuh", "from.drh[g] += rh[g];", "from.drh[g] = rh[g];"),
    (
        "tangent: c before the step is that after it",
        "tangent.cuh",
        "t.cells.at(r_before)[e.unit]",
        "t.cells.at(r)[e.unit]",
    ),
    ("adjoint: dc of the step before", "elements.cuh", "d.dc_all.at(first_row + e.n)[e.unit] = A(upstream.c);", ";"),
    ("wave: a chunk doesn't wait for the layer before", "stack.cuh", "if (i > 0) fork.wait(i, i - 1);", ""),
    (
        "wave: h isn't left for the next launch",
        "cluster.cuh",
        "d.h[p.range.last % 2].at",
        "d.h[1 - p.range.last % 2].at",
    ),
    ("wave: c isn't left for the next launch", "cluster.cuh", *swap(WAVE_C, "cells.store();", "")),
    ("wave: dc isn't left for the next launch", "cluster.cuh", "if (first > 0) cells.store();", ""),
    ("wave: drh of the launch before isn't read", "cluster.cuh", "? last + 1 : last;", "? last : last;"),
    ("wave: every chunk has the first one's input", "forward.cuh", "(x, 0, row, rows)", "(x, 0, 0, rows)"),
    ("wave: every chunk has the last one's dx", "backward.cuh", "(dx, 0, row, rows)", "(dx, 0, 0, rows)"),
    ("wave: weight gradients before the last chunk", "stack.cuh", "if (k == chunks) return", "if (k == 0) return"),
]


def main() -> int:
    survivors = []
    wanted = "".join(sys.argv[1:2])
    for what, file, old, new in MUTANTS:
        if wanted not in f"{what} ({file})":
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_host", "--ops", "fusedrnn_cuda_host", *TESTS]
        done = subprocess.run([*command, "--mutate", json.dumps([file, old, new])], capture_output=True, text=True)
        # 1: a test failed. Negative, or an abort: the kernel deadlocked.
        caught = done.returncode in (1, -6)
        sys.stdout.write(f"{'caught  ' if caught else 'SURVIVED'}  {what} ({Path(file).name})\n")
        if not caught:
            survivors.append(what)
            sys.stdout.write(done.stdout[-2000:] + done.stderr[-2000:])
        sys.stdout.flush()
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
