"""`ep-plugin convert`: a dense checkpoint becomes a Mixture-of-Experts that computes the same."""

import argparse
import sys

from ep_plugin.checkpoint.adapt.upcycle import add_experts
from ep_plugin.checkpoint.manifest import seal
from ep_plugin.checkpoint.open import open_source
from ep_plugin.checkpoint.staging import check_room, staged
from ep_plugin.checkpoint.target import aim, fit_family
from ep_plugin.commands.convert.compare import Differs, compare, load_compare
from ep_plugin.commands.convert.flags import EXAMPLES as EXAMPLES
from ep_plugin.commands.convert.flags import add_arguments as add_arguments
from ep_plugin.commands.convert.request import read_request
from ep_plugin.commands.convert.say import check_manifest, say_plan, say_summary, write


def run(args: argparse.Namespace) -> int:
    """Convert. Returns 0, or 1 when the result does not compute what the source computes.

    Raises ConfigError for a user's mistake.
    """
    request = read_request(args)
    if request.check:
        return check_manifest(request.target)
    dense = open_source(request.source, request.format)
    model = add_experts(dense, request.settings, request.keep_optimizer)
    model = fit_family(model, dense, request.format, request.family)
    target = aim(model, request.format, request.implementation)
    if request.dry_run:
        return say_plan(request, target)
    check_room(request.target, target.num_bytes)
    comparison = load_compare(request, target)
    try:
        with staged(request.target, dense.folder, request.asked) as staging:
            hashes = write(target, staging, request.processes)
            report = compare(comparison, request, target, staging.folder)
            seal(staging.folder, hashes, target.content, request.manifest)
    except Differs as error:
        print(f"ep-plugin convert: {error}", file=sys.stderr)
        return 1
    return say_summary(request, target, report)
