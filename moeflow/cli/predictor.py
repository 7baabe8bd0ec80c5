"""`moeflow predictor`: train predictors on traces and measure them."""

import argparse
import json


def add_predictor_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `predictor` and its commands to the parser's commands."""
    predictor = commands.add_parser("predictor", help="routing predictors: train them on traces, measure them")
    below = predictor.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = below.add_parser("train", help="train a predictor on a trace")
    train.add_argument("trace", help="a trace file")
    train.add_argument("--kind", choices=("path", "sequence"), default="sequence", help="which one (sequence)")
    train.add_argument("-o", "--out", required=True, metavar="P", help="predictor to write")
    train.add_argument("--seed", type=int, default=0, metavar="S", help="of weights, order and dropout (0)")
    train.add_argument("--epochs", type=int, default=8, metavar="N", help="at most; stops early (8)")
    train.add_argument(
        "--hold-out", type=int, default=5, metavar="N", help="every Nth sequence is never trained on (5)"
    )
    train.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    train.add_argument("--json", action="store_true", help="print one JSON object")
    train.set_defaults(run=_train)

    evaluate = below.add_parser("eval", help="measure a predictor on the sequences held out from its training")
    evaluate.add_argument("predictor", help="a predictor's file, or popularity, markov or lookahead")
    evaluate.add_argument("trace", help="a trace file of the same model")
    evaluate.add_argument("--all", action="store_true", help="on all sequences, those trained on included")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)


def _train(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from moeflow.cli.progress import share_progress
    from moeflow.predictors.training import TrainingOptions
    from moeflow.trace.trace import RoutingTrace
    from moeflow.trace.train_predictor import train_predictor

    options = TrainingOptions(seed=arguments.seed, epochs=arguments.epochs, device=arguments.device)
    trace = RoutingTrace.open(arguments.trace)
    with share_progress(f"training {arguments.kind}") as progress:
        card = train_predictor(
            trace, arguments.kind, arguments.out, hold_out=arguments.hold_out, options=options, progress=progress
        )
    if arguments.json:
        print(json.dumps({"predictor": arguments.out, **asdict(card)}))
    else:
        facts = card.trained_on
        print(f"wrote {arguments.out}: {card.kind}, trained on {facts['tokens']:,} tokens")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from moeflow.cli.progress import share_progress
    from moeflow.replay.predictor_quality import evaluate_predictor
    from moeflow.trace.trace import RoutingTrace
    from moeflow.trace.train_predictor import open_predictor, split_sequences

    trace = RoutingTrace.open(arguments.trace)
    predictor, hold_out = open_predictor(arguments.predictor, trace)
    places = list(range(len(trace.sequences()))) if arguments.all else split_sequences(trace, hold_out)[1]
    with share_progress("evaluating") as progress:
        figures = evaluate_predictor(predictor, trace, places, progress=progress)
    if arguments.json:
        print(json.dumps(figures))
        return 0
    print(f"{figures['predictor']}: {figures['tokens']:,} decode steps of {figures['sequences']:,} sequences")
    for title, name in (("all layers before the step", "all_layers"), ("next layer in the step", "next_layer")):
        measured = "  ".join(f"{key} {value:.3f}" for key, value in figures[name].items() if value is not None)
        print(f"{title:>26}  {measured}")
    return 0
