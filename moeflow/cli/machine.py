"""The options of `moeflow trace replay` that describe a machine, and the rows of a replay on it."""

from moeflow.errors import ConfigError


def add_machine_options(parser) -> None:
    """Add a machine, who predicts on it, and which sequences are replayed."""
    machine = parser.add_argument_group("on a machine", "what decoding would cost; the first three go together")
    machine.add_argument("--link-gb-s", type=float, metavar="GB", help="gigabytes a second of the link")
    machine.add_argument("--expert-mb", type=float, metavar="MB", help="megabytes of one expert")
    machine.add_argument("--layer-ms", type=float, metavar="MS", help="milliseconds of one layer, all resident")
    machine.add_argument(
        "--predictor",
        metavar="P",
        help="prefetch and evict by popularity, markov, lookahead (where the trace holds it), clairvoyant, or a file",
    )
    machine.add_argument("--in-flight", type=int, metavar="N", help="prefetches under way at once (4)")
    parser.add_argument("--hold-out", type=int, metavar="N", help="only every Nth sequence, as training holds it out")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N sequences of those")


def machine_of(arguments):
    """Return the machine that was asked for, None without one.

    Raises:
        ConfigError: options that do not go together, or no sizes.
    """
    from moeflow.replay.link import LinkModel

    sizes = {"--link-gb-s": arguments.link_gb_s, "--expert-mb": arguments.expert_mb, "--layer-ms": arguments.layer_ms}
    given = [name for name, value in sizes.items() if value is not None]
    if not given:
        for name, value in (("--predictor", arguments.predictor), ("--in-flight", arguments.in_flight)):
            if value is not None:
                raise ConfigError(f"{name} works on a machine. Give it: {', '.join(sizes)}.")
        return None
    if len(given) < len(sizes):
        raise ConfigError(f"{', '.join(given)} alone is no machine. Give {', '.join(sizes)} together.")
    for name, value in sizes.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value:g} is out of range. Give a number above 0.")
    for name, value, usual in (
        ("--warm", arguments.warm, False),
        ("--per-layer", arguments.per_layer, False),
        ("--phase all", arguments.phase == "all", False),
        ("--seed", arguments.seed, 0),
    ):
        if value != usual:
            raise ConfigError(
                f"{name} does not go with {given[0]}: on a machine, decode steps are replayed from a cold cache of one "
                "pool. Leave one of the two out."
            )
    if arguments.in_flight is not None:
        if arguments.predictor is None:
            raise ConfigError("--in-flight limits prefetches, and without --predictor there are none.")
        if arguments.in_flight < 1:
            raise ConfigError(f"--in-flight {arguments.in_flight} prefetches nothing. Give at least 1.")
    return LinkModel(
        round(arguments.expert_mb * 1e6),
        arguments.link_gb_s * 1e9,
        arguments.layer_ms / 1e3,
        **({} if arguments.in_flight is None else {"in_flight": arguments.in_flight}),
    )


def machine_rows(trace, residencies, policies, link, predictor, places) -> list[dict]:
    """Replay every policy at every residency on a machine, a predictor's last."""
    from moeflow.cli.progress import count_progress
    from moeflow.replay.demand import slots_of
    from moeflow.replay.machine import FORECAST, check_policy, replay_machine

    if predictor is not None and FORECAST not in policies:
        policies = [*policies, FORECAST]
    for residency in residencies:  # before the work, not in the middle of it
        slots_of(residency, trace.experts_per_layer, trace.top_k)
    for policy in policies:
        check_policy(policy, predictor)
    rows = []
    for policy in policies:
        for residency in residencies:
            with count_progress(f"{policy} at {residency:g} %") as progress:
                rows.append(
                    replay_machine(
                        trace,
                        residency,
                        policy,
                        link,
                        predictor=predictor if policy == FORECAST else None,
                        places=places,
                        progress=progress,
                    )
                )
    return rows
