"""The front door: the `lookalike` command. A verb imports its room only when it runs."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from service import release
from service.errors import InvalidRequest, LookalikeError, NotOfThisStore

if TYPE_CHECKING:
    from service.account import Account
    from service.jobs.sync import Synced, Target

# Packages that only an extra of the project installs.
_EXTRAS = {
    "onnxruntime": "cpu (or gpu, for CUDA)",
    "sklearn": "demo",
    "ray": "ray",
    "pymilvus": "milvus",
    **dict.fromkeys(("jinja2", "matplotlib", "onnxscript", "tensorboard", "timm", "torch", "torchvision"), "train"),
}

cli = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lookalike {release()}")
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version and commit.")
    ] = False,
) -> None:
    """Train an image encoder on your own pictures, and serve similarity search with it."""


store_cli = typer.Typer(
    no_args_is_help=True,
    help="Look after a store: check, back up, restore; go back or remove what is old; items as Parquet.",
)
cli.add_typer(store_cli, name="store")

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder, .zip, .tar, shards/train-{000..009}.tar, .parquet, mnist/train, digits, cifar10/train; "
        "a slice may follow, as in mnist/test[:8000].",
    ),
]
DataRoot = Annotated[Path, typer.Option(help="Where named sets lie, in torchvision's layout.")]
Model = Annotated[Path, typer.Option(help="Folder of the encoder.")]


def _in_folder(store: Path | None) -> Path | None:
    """Return the store's folder. Raises NotOfThisStore if it is on Milvus."""
    from service.store.milvus_address import parse_address

    if store is not None and parse_address(store) is not None:
        raise NotOfThisStore("--store: expected a folder; this is not done with a store on Milvus")
    return store


StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of the store.", callback=_in_folder)]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train.")]
ImageKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="The picture to take of a WebDataset sample that has several, as in input.jpg."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the encoder in OUT, which stays until the new one is whole.")
]
MaybeStore = Annotated[
    Path | None, typer.Option("--store", help="Folder of the store; a service that serves it does the work.")
]
Url = Annotated[
    str | None, typer.Option(help="A running service, in place of --store; LOOKALIKE_URL if neither is given.")
]
Key = Annotated[str | None, typer.Option(help="API key of the service; LOOKALIKE_KEY if left out.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@cli.command(epilog="Example: lookalike pretrain digits --recipe mnist-simclr --set epochs=1 --out models/mine")
def pretrain(
    source: Source,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a .toml file.")],
    out: Annotated[Path, typer.Option(help="Folder to write the encoder to.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as often as you like.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time for the steps, in place of the recipe's epochs; a deadline.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Weights to begin with: DEFAULT for torchvision's, a state file, a run or its model folder."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the run's checkpoint; more --minutes extend the run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the encoder in OUT, and its run, once the new one is whole.")
    ] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Time between two checkpoints.")] = 3,
    device: Device = "auto",
    image_key: ImageKey = None,
    data_root: DataRoot = Path("data"),
    as_json: Json = False,
) -> None:
    """Train an encoder on your own pictures and export it. The run's checkpoint and log lie in OUT.run."""
    _need_torch()
    from service.settings import read_own_settings
    from training.device import choose_device
    from training.distributed import first, joined
    from training.pretrain import pretrain as run
    from training.recipe import read_recipe

    if minutes is not None and not 0 < minutes < 1e6:
        raise InvalidRequest(f"--minutes: expected a time above 0, got {minutes}")
    chosen = read_recipe(recipe, change or ())
    # Under torchrun this process is one of several, and the first speaks for all.
    with joined(choose_device(device)):
        done = run(
            source,
            chosen,
            out,
            minutes,
            device,
            data_root,
            init,
            resume,
            checkpoint_minutes,
            overwrite,
            image_key,
            read_own_settings().limits,
        )
        if first():
            _finish(f"{source}: {done.added} pictures; {done.bad} could not be read", done, as_json)


@cli.command(epilog="Example: lookalike export models/mine.run --out models/mine --overwrite")
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a pretraining run, OUT.run.")],
    out: Annotated[Path, typer.Option(help="Folder to write the encoder to.")],
    overwrite: Overwrite = False,
    data_root: DataRoot = Path("data"),
) -> None:
    """Export the encoder of a run's checkpoint again, with its variants; the run's source must be where it was."""
    _need_torch()
    from service.settings import read_own_settings
    from training.pretrain import export_run

    export_run(run_folder, out, data_root, overwrite, read_own_settings().limits)


@cli.command("import", epilog="Example: lookalike import efficientnet-lite0 --out models/photos")
def import_encoder(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="efficientnet-lite0; hf:ORG/NAME[@REVISION], a folder of that layout or an .onnx file, none of which "
            "needs torch; timm:NAME or torchvision:NAME in the training environment.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the encoder to.")],
    weights: Annotated[
        str, typer.Option(help="Of timm: and torchvision: DEFAULT for their own, or a state file of yours.")
    ] = "DEFAULT",
    side: Annotated[
        str | None, typer.Option(metavar="S", help="Of an .onnx file: side of its pixels, or HEIGHTxWIDTH.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Of an .onnx file: subtracted from pixels in 0..1.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Of an .onnx file: they are divided by it then.")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Of an .onnx file: the shortest edge before the central crop, bicubic; the side if left out.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of a graph: the output that is the embedding; NAME:class or NAME:mean of tokens."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an encoder that others have trained: for photographs, of Hugging Face's hub, timm or torchvision."""
    from service.encoding.model_folder import check_new
    from service.encoding.pretrained import EFFICIENTNET_LITE0, import_efficientnet_lite0

    elsewhere = what.startswith(("timm:", "torchvision:"))
    if what != EFFICIENTNET_LITE0 and not elsewhere:
        from service.encoding.imported import Choices, import_onnx, is_onnx

        if is_onnx(what):
            if weights != "DEFAULT":
                raise InvalidRequest(f"--weights {weights}: {what} comes with its own; leave the option out")
            import_onnx(what, out, Choices(side, mean, std, resize, output), overwrite)
            print(f"wrote {out}")
            return
    if any(option is not None for option in (side, mean, std, resize, output)):
        raise InvalidRequest(
            f"{what}: brings its own preprocessing; --side, --mean, --std, --resize and --output are not for it"
        )
    if what == EFFICIENTNET_LITE0:
        if weights != "DEFAULT":
            raise InvalidRequest(f"--weights {weights}: {EFFICIENTNET_LITE0} comes with its own; leave the option out")
        import_efficientnet_lite0(out, overwrite)
        print(f"wrote {out}")
        return
    _need_torch()
    check_new(out, overwrite)
    from training.importing import import_backbone

    import_backbone(what, weights, out)


@cli.command(epilog="Example: lookalike whiten models/mine --calibrate digits --out models/white")
def whiten(
    model: Annotated[Path, typer.Argument(help="Folder of an encoder.")],
    calibrate: Annotated[
        str, typer.Option(metavar="SOURCE", help="Many pictures of the kind that will be searched; no labels needed.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the new encoder to.")],
    power: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="0 centres and rotates, 1 whitens fully; by the pictures if left out."),
    ] = None,
    dimension: Annotated[
        int | None,
        typer.Option(min=1, help="Numbers of the new embeddings; as many as suit the pictures if left out."),
    ] = None,
    overwrite: Overwrite = False,
    image_key: ImageKey = None,
    data_root: DataRoot = Path("data"),
) -> None:
    """Write a copy of an encoder that ends in a whitening: better matches, and scores near 0 for strangers.

    Of fewer than 500 pictures it learns the mean alone. Pictures of another kind make it worse.
    """
    from service.jobs.whiten import whiten as run
    from service.settings import read_own_settings
    from service.sources import open_source

    pictures = open_source(calibrate, data_root, image_key)
    done = run(model, pictures, out, read_own_settings(), power, dimension, overwrite)
    _finish(f"{out}: learnt on {done.added} pictures; {done.bad} could not be read", done)


@cli.command(epilog="Example: lookalike evaluate models/mine --bank 'digits[:1000]' --queries 'digits[1000:]'")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of the encoder.")],
    bank: Annotated[str, typer.Option(help="The pictures that vote: SOURCE with labels, or a folder of `embed`.")],
    queries: Annotated[str, typer.Option(help="The pictures to name: SOURCE with labels, or a folder of `embed`.")],
    image_key: ImageKey = None,
    data_root: DataRoot = Path("data"),
    variant: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"], typer.Option(help="Of the encoder; the fastest if auto.")
    ] = "auto",
    runtime: Annotated[
        Literal["auto", "onnxruntime", "openvino"] | None, typer.Option(help="What runs it; the faster one if auto.")
    ] = None,
    labels_as_text: Annotated[
        bool, typer.Option("--labels-as-text", help="Also name the queries by the words of their labels alone.")
    ] = False,
    template: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="With --labels-as-text: how a label is put, as in 'a photo of a {label}'."),
    ] = None,
    as_json: Json = False,
    report: Annotated[Path | None, typer.Option(help="Folder to write a report to, report.html in it.")] = None,
) -> None:
    """Report how good an encoder is as it is served, beside raw pixels and a random encoder."""
    _need_torch()
    from service.settings import read_own_settings
    from training.evaluate import evaluate as run
    from training.evaluate import list_left_out, print_table

    if wrong := [text for text in template or () if "{label}" not in text]:
        raise InvalidRequest(f"--template {wrong[0]}: expected {{label}} in it, as in 'a photo of a {{label}}'")
    if template and not labels_as_text:
        raise InvalidRequest("--template: is for --labels-as-text; expected both")
    if report is not None:
        from training.report import check_folder, write_report

        check_folder(report)
    as_text = (template or []) if labels_as_text else None
    settings = read_own_settings(runtime=runtime)
    evaluation = run(
        model, bank, queries, data_root, variant, image_key, settings.limits, as_text, runtime=settings.runtime
    )
    account = evaluation.account
    if report is not None:
        write_report(report, evaluation)
    list_left_out(account, report)
    account.report()
    for note in evaluation.notes():
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        facts = account.facts()
        print(json.dumps(evaluation.report | {key: facts[key] for key in ("lost", "listed_in")}))
    else:
        print_table(evaluation, bank, queries)
    raise typer.Exit(1 if account.lost else 0)


@cli.command(epilog="Example: lookalike embed digits --model models/mine --out embeddings")
def embed(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="As for `index`: a folder, archive, table, a pattern such as 'photos/**/*.jpg' in quotes, a named "
            "set; or - for a list of paths on stdin.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Folder of parts to write, or to bring in step with the source; or a URL, as s3://bucket/out."
        ),
    ],
    model: Annotated[Path | None, typer.Option(help="Folder of the encoder; the default one if left out.")] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the embeddings' numbers.")] = "float32",
    format: Annotated[
        Literal["parquet", "npy"],
        typer.Option(help="Parquet parts, or the layout of clip-retrieval: img_emb/*.npy and metadata/*.parquet."),
    ] = "parquet",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is in OUT; a repeat does so without this option, too.")
    ] = False,
    nul: Annotated[bool, typer.Option("-0", help="The paths on stdin end with NUL, as from find -print0.")] = False,
    image_key: ImageKey = None,
    data_root: DataRoot = Path("data"),
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Embed on a Ray cluster: local for one on this machine, auto for the running one, or its address.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Embed a whole source into a folder of Parquet parts or NumPy files.

    Run again, it goes on after an interruption, embeds what is new or has changed, and drops what is gone.

    Example: find photos -name '*.jpg' -print0 | lookalike embed -0 - --out photos.parquet
    """
    del resume
    from service.encoder_choice import choose_model
    from service.jobs.embed import embed_source, embedded
    from service.jobs.ray_embed import Origin, connect, on_ray
    from service.settings import read_own_settings
    from service.sources.listed import open_list, read_list

    if ray and source == "-":
        raise InvalidRequest("--ray: expected a SOURCE that every node can open, not a list of paths on stdin")
    if nul and source != "-":
        raise InvalidRequest(f"-0: is for a list of paths on stdin; expected the source -, got {source}")
    if source == "-":
        pictures = open_list(source, read_list(sys.stdin.buffer.read(), nul))
    else:
        pictures = Origin(source, data_root, image_key).open()
    settings = read_own_settings(model=model)
    chosen, choice = choose_model(settings.model_copy(update={"no_store": True}), source)
    if choice:
        print(choice, file=sys.stderr)
    if ray:
        connect(ray)
    engine = on_ray(Origin(source, data_root, image_key)) if ray else embedded
    try:
        done = embed_source(pictures, chosen, out, settings, dtype, format == "npy", engine)
    except KeyboardInterrupt:
        print(f"{out}: stopped; what is embedded is written, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    replaced = f", {done.replaced} again because they changed" if done.replaced else ""
    _finish(
        f"{out}: {done.added} pictures embedded now{replaced}, {done.known} earlier; {done.bad} could not be read",
        done,
        as_json,
    )


@cli.command(epilog="Example: lookalike index digits --model models/mine --store gallery")
def index(
    source: Source,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of the store, made when it is not there; a service that serves it does the work."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the encoder; the store's own if left out.")] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Begins the ids; '' to replace other sources' pictures. Chosen where ids collide if left out."
        ),
    ] = None,
    keep_originals: Annotated[
        bool, typer.Option("--keep-originals", help="Copy a folder's pictures into the store, so that it stands alone.")
    ] = False,
    sync: Annotated[
        bool,
        typer.Option(
            "--sync", help="Follow a folder: also replace, rename and remove what was changed; metadata stay."
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="--sync at once, and after each change of the folder, until Ctrl-C.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --sync: list what would be done.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --sync: remove items even if that is most of them, or all.")
    ] = False,
    image_key: ImageKey = None,
    data_root: DataRoot = Path("data"),
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Add a source's pictures to a store. Those already there with the same bytes are passed over."""
    from service.client.discovery import find_service

    client = find_service(store, url, key)
    if sync or watch:
        from service.jobs.sync import Target
        from service.settings import read_own_settings

        if watch and dry_run:
            raise InvalidRequest("--watch and --dry-run: expected one of them")
        _in_folder(store)
        if image_key is not None:
            raise InvalidRequest("--image-key: is for samples in a .tar, which --sync does not follow")
        if client is not None:
            from service.jobs.served import check_choices

            check_choices(client, model, keep_originals)
        settings = read_own_settings(model=model, store=store, keep_originals=keep_originals or None)
        target = Target(settings, client if store is None else None, key)
        _sync(source, target, prefix, watch, dry_run, yes, as_json)
        return
    for option, given in (("--dry-run", dry_run), ("--yes", yes)):
        if given:
            raise InvalidRequest(f"{option}: is for --sync; expected both")
    if client is not None:
        from service.jobs.served import check_choices, index_served, left_out_of
        from service.sources import open_source

        check_choices(client, model, keep_originals)
        done = index_served(open_source(source, data_root, image_key), client, prefix, left_out_of(store, "index"))
        _finish_index(client.url, done, as_json)
    assert store is not None
    from service.encoder_choice import choose_model
    from service.gallery import open_gallery
    from service.jobs.index import index_source
    from service.settings import read_own_settings
    from service.sources import open_source

    pictures = open_source(source, data_root, image_key)
    settings = read_own_settings(model=model, store=store, keep_originals=keep_originals or None)
    chosen, choice = choose_model(settings, source)
    if choice:
        print(choice, file=sys.stderr)
    gallery = open_gallery(settings.model_copy(update={"model": chosen}))
    try:
        done = index_source(pictures, gallery, prefix, gallery.keeps_all_originals)
        gallery.store.settle()
        notice = gallery.notice()
    finally:
        gallery.close()
    done.notes += [notice] if notice else []
    _finish_index(str(store), done, as_json)


@cli.command(epilog="Example: lookalike reindex --model models/white --store gallery")
def reindex(
    store: StoreFolder,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the encoder; the one for photographs if left out.")
    ] = None,
) -> None:
    """Embed a store's pictures again with another encoder; a service may keep running meanwhile."""
    from service.encoding.pretrained import default_encoder
    from service.jobs.reindex import reindex as run
    from service.settings import read_own_settings

    settings = read_own_settings(store=store)
    model = model or default_encoder()
    count = run(model, settings)
    print(
        f"{store}: {count} pictures are of the encoder {model} now; a running service takes them up on SIGHUP",
        file=sys.stderr,
    )


@cli.command(epilog="Example: lookalike search seven.png --store gallery -k 5")
def search(
    store: MaybeStore = None,
    image: Annotated[Path | None, typer.Argument(help="A picture.")] = None,
    text: Annotated[str | None, typer.Option(help="Words in place of a picture, if the encoder reads them.")] = None,
    k: Annotated[int, typer.Option("-k", help="Hits to show.")] = 10,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Find the pictures of a store that are most like a picture, or like words."""
    from service.client.discovery import find_service
    from service.queries import PictureQuery, Query, TextQuery

    query: Query
    if text is not None and image is None:
        query = TextQuery(text)
    elif image is not None and text is None:
        try:
            query = PictureQuery(image.read_bytes())
        except OSError as error:
            raise InvalidRequest(f"{image}: cannot be read: {error.strerror}") from error
    else:
        raise InvalidRequest("expected a picture or --text, and not both")
    client = find_service(store, url, key)
    if client is not None:
        found = [(hit.id, hit.score, hit.metadata) for hit in client.search(query, k)]
    else:
        from service.gallery import open_gallery
        from service.settings import read_own_settings

        gallery = open_gallery(read_own_settings(store=store, read_only=True))
        try:
            found = [(hit.id, hit.score, hit.metadata) for hit in gallery.find([query], k)[0]]
        finally:
            gallery.close()
    if as_json:
        print(json.dumps({"hits": [{"id": id, "score": score, "metadata": metadata} for id, score, metadata in found]}))
        return
    for id, score, metadata in found:
        print(f"{score:.4f}  {id}  {json.dumps(metadata, ensure_ascii=False)}")


@cli.command(epilog="Example: lookalike duplicates --store gallery --html duplicates.html")
def duplicates(
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", help="Folder of the store; a service that serves it does the work.", callback=_in_folder
        ),
    ] = None,
    preset: Annotated[
        Literal["exact", "near", "alike"],
        typer.Option(help="The same bytes; resized or compressed; also cropped, turned or written on."),
    ] = "near",
    threshold: Annotated[
        float | None, typer.Option(help="Least score of two pictures of a group, in place of the preset's.")
    ] = None,
    as_json: Json = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a table.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a sheet with thumbnails.")] = None,
    script: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a shell script that removes all files but the best.")
    ] = None,
    delete_rest: Annotated[
        Path | None,
        typer.Option(
            metavar="LIST",
            help="List all but the best copies in a file and remove nothing; with --yes, remove what that file lists.",
        ),
    ] = None,
    files: Annotated[
        bool, typer.Option("--files", help="With --yes, remove their files, too, if they are as they were indexed.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what LIST names.")] = False,
    url: Url = None,
    key: Key = None,
) -> None:
    """Find pictures that a store has more than once, and the best copy of each; a service may keep running."""
    from service.client.discovery import find_service
    from service.jobs import duplicates as job
    from service.settings import read_own_settings

    client = find_service(store, url, key)
    if (files or yes) and delete_rest is None:
        raise InvalidRequest(f"{'--yes' if yes else '--files'}: needs the list of --delete-rest LIST")
    if yes and (csv or html or script):
        raise InvalidRequest("--yes: removes what LIST names and writes nothing; expected no --csv, --html or --script")
    if yes:
        assert delete_rest is not None
        from service.jobs.removal import delete_listed

        if store is None:
            raise InvalidRequest("--yes: works on the store's own machine; expected --store")
        done = delete_listed(delete_rest, read_own_settings(store=store), files, client)
        print(json.dumps(done.facts()) if as_json else "\n".join(done.lines()))
        raise typer.Exit(1 if done.left else 0)
    if store is None:
        from service.jobs.served import find_duplicates

        assert client is not None
        if csv or html or script or delete_rest:
            raise InvalidRequest("--csv, --html, --script and --delete-rest need --store, on the store's own machine")
        for line in find_duplicates(client, preset, threshold, as_json):
            print(line)
        return
    found = job.search(read_own_settings(store=store, read_only=True), preset, threshold)
    notes = found.write(csv, html, script, delete_rest)
    if as_json:
        print(json.dumps(found.shown()))
    elif csv is html is script is delete_rest is None:
        for line in found.lines():
            print(line)
    for note in notes:
        print(note, file=sys.stderr)


@cli.command(epilog="Example: lookalike serve --store gallery")
def serve(
    model: Annotated[Path | None, typer.Option(help="Folder of the encoder; the store's own if left out.")] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of the store; made when it is not there. Or milvus://HOST:PORT/COLLECTION."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of the encoder: fp32, bf16, fp16, int8; the fastest if auto.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="What runs it: onnxruntime, openvino; the faster one if auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or auto for cuda where it works.")] = None,
    no_store: Annotated[bool | None, typer.Option("--no-store", help="Embed alone and keep nothing.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; more than one only with --no-store or Milvus.")
    ] = None,
    read_only: Annotated[
        bool | None, typer.Option("--read-only", help="Beside the process that changes the store; follows its changes.")
    ] = None,
) -> None:
    """Serve search over HTTP, with a page, until Ctrl-C."""
    from service.serving import serve as run
    from service.settings import read_settings

    settings = read_settings(
        model=model,
        store=store,
        host=host,
        port=port,
        variant=variant,
        runtime=runtime,
        device=device,
        no_store=no_store,
        workers=workers,
        read_only=read_only,
    )
    run(settings)


@cli.command("try", epilog="Example: lookalike try digits")
def try_out(
    source: Source,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the encoder; the one for photographs if left out.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")] = None,
    data_root: DataRoot = Path("data"),
) -> None:
    """Index a folder of pictures, serve it, and open the page: `index` and `serve` in one, with a store by itself."""
    import zlib

    from service.serving import serve as run
    from service.settings import read_settings

    # Each source has a store of its own, which the next call finds again; it follows a folder that has changed.
    path = Path(source).absolute()
    store = Path(".lookalike/try") / f"{path.name}-{zlib.crc32(os.fsencode(path)):08x}"
    # Pictures that could not be taken are named, and the others are served.
    with suppress(typer.Exit):
        index(source, store, model, sync=path.is_dir(), data_root=data_root)
    run(read_settings(model=model, store=store, host=host, port=port), open_page=True)


@store_cli.command(epilog="Example: lookalike store check --store gallery")
def check(store: StoreFolder) -> None:
    """Read everything in a store and name each problem; exit code 1 if there is one."""
    from service.store.check import examine
    from service.store.layout import current

    problems = 0
    for problem in examine(current(store)):
        print(problem)
        problems += 1
    print(f"{store}: {problems or 'no'} problem{'s' * (problems != 1)} found", file=sys.stderr)
    raise typer.Exit(1 if problems else 0)


@store_cli.command(epilog="Example: lookalike store backup --store gallery --out gallery.backup")
def backup(
    store: StoreFolder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, in place of an earlier backup.")],
) -> None:
    """Write a store into one file, checked and safe on the disk; a service may keep running and changing it."""
    from service.generations import written
    from service.store.backup import backup as run
    from service.store.backup import count_in_files

    print(f"{out}: {run(written(store), out)} items backed up", file=sys.stderr)
    if count := count_in_files(out):
        print(
            f"{count} of them keep their pictures in the files that were indexed: back these up, too, "
            "or index them with --keep-originals",
            file=sys.stderr,
        )


@store_cli.command(epilog="Example: lookalike store restore gallery.backup --store restored")
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of `store backup`.")],
    store: Annotated[Path, typer.Option(help="Folder of the new store.")],
) -> None:
    """Make a new store from a backup."""
    from service.store.backup import restore as run

    print(f"{store}: {run(file, store)} items restored", file=sys.stderr)


@store_cli.command(epilog="Example: lookalike store rollback --store gallery")
def rollback(store: StoreFolder) -> None:
    """Go back to the encoder before the last `reindex`, with all changes since; a service may keep running."""
    from service.jobs.reindex import rollback as run
    from service.settings import read_settings

    model, count = run(read_settings(store=store))
    print(
        f"{store}: {count} pictures are of the encoder {model} again; a running service takes them up on SIGHUP",
        file=sys.stderr,
    )


@store_cli.command(epilog="Example: lookalike store prune --store gallery")
def prune(store: StoreFolder) -> None:
    """Remove all generations but the current one, with the pictures that were deleted since."""
    from service.generations import prune as run

    removed = run(store)
    for one in removed:
        print(f"{store}: generation {one.number} removed, {one.size / 1e6:.1f} MB", file=sys.stderr)
    if not removed:
        print(f"{store}: has no generation but the current one", file=sys.stderr)


@store_cli.command("export", epilog="Example: lookalike store export --store gallery --out items")
def export_store(
    out: Annotated[Path, typer.Option(help="Folder of Parquet parts to write.")],
    store: Annotated[Path | None, typer.Option("--store", help="Folder of the store; a service may serve it.")] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Write a store's items as Parquet: embeddings, metadata and pictures. A service may keep running."""
    if store is None:
        from service.client.discovery import find_service
        from service.jobs.served import export_served

        client = find_service(store, url, key)
        assert client is not None
        count, bare = export_served(client, out)
    else:
        from service.gallery import open_gallery
        from service.jobs.transfer import export_store as run
        from service.settings import read_settings

        if url is not None:
            raise InvalidRequest("expected --store or --url, and not both")
        # Beside the service, whose files these are.
        gallery = open_gallery(read_settings(store=store, read_only=True))
        try:
            count, bare = run(gallery, out)
        finally:
            gallery.close()
    print(f"{out}: {count} items written", file=sys.stderr)
    if bare:
        print(f"{len(bare)} of them without their pictures, such as {bare[0].id}: {bare[0].error}", file=sys.stderr)


@store_cli.command("copy", epilog="Example: lookalike store copy gallery milvus://db:19530/gallery")
def copy_store(
    source: Annotated[
        Path, typer.Argument(metavar="FROM", help="Folder of a store, or milvus://HOST:PORT/COLLECTION.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TO", help="The other kind; made when it is not there.")],
) -> None:
    """Copy a store to Milvus, or back, and check the copy. A copy that was interrupted goes on when called again."""
    from service.jobs.copy import copy as run
    from service.settings import read_settings

    done = run(read_settings(store=source, read_only=True), read_settings(store=target))
    more = f"; {done.more} more were there and stay" if done.more else ""
    print(f"{target}: {done.written} items written, {done.known} there already{more}; checked", file=sys.stderr)
    if done.dismissed:
        print(f"{done.dismissed} pairs that are no duplicates stay behind: Milvus keeps none", file=sys.stderr)
    if done.bare:
        print(f"{done.bare} items are without their pictures: LOOKALIKE_PICTURES names no place", file=sys.stderr)


@store_cli.command("import", epilog="Example: lookalike store import items --store copy --model models/mine")
def import_items(
    source: Annotated[Path, typer.Argument(metavar="PARQUET", help="A .parquet file, or a folder of them.")],
    store: MaybeStore = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the encoder; the store's own if left out.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Add the items of Parquet files: of `store export`, of `embed`, or made elsewhere: id and embedding at least."""
    from service.client.discovery import find_service

    client = find_service(store, url, key)
    if client is not None:
        from service.jobs.served import check_choices, import_served, left_out_of

        check_choices(client, model)
        done = import_served(source, client, left_out_of(store, "import"))
    else:
        from service.gallery import open_gallery
        from service.jobs.transfer import import_items as run
        from service.settings import read_settings

        gallery = open_gallery(read_settings(model=model, store=store))
        try:
            done = run(source, gallery)
            gallery.store.settle()
        finally:
            gallery.close()
    replaced = f", {done.replaced} replaced" if done.replaced else ""
    where = store if client is None else client.url
    _finish(
        f"{where}: {done.added} items added{replaced}, {done.known} there already, {done.bad} cannot be", done, as_json
    )


@cli.command(epilog="Example: lookalike doctor --store gallery")
def doctor(
    model: Annotated[Path | None, typer.Option(help="Folder of an encoder; the store's own if left out.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of a store.", callback=_in_folder)] = None,
    paths: Annotated[bool, typer.Option("--paths", help="Show paths, not their last parts alone.")] = False,
    as_json: Json = False,
) -> None:
    """Print what a report of a problem should say: versions, machine, encoder and store, each checked."""
    from service.jobs.doctor import examine
    from service.settings import read_settings

    lines = []
    for line in examine(read_settings(model=model, store=store), paths):
        lines.append(line)
        if not as_json:
            print(f"{'PROBLEM' if line.problem else 'ok':8}{line.about:10} {line.found}")
    if as_json:
        print(json.dumps({"lines": [line._asdict() for line in lines]}))
    raise typer.Exit(1 if any(line.problem for line in lines) else 0)


@cli.command(epilog="Example: lookalike info models/mine")
def info(
    model: Annotated[Path, typer.Argument(help="Folder of the encoder.")],
    as_json: Json = False,
) -> None:
    """Show an encoder's card, after checking its files against it."""
    from service.encoding.card import digest, read_card

    card = read_card(model)
    try:
        from service.encoding.encoder import Encoder
        from service.encoding.text import open_text_tower

        dimension = Encoder(card, variant="fp32").dimension
        open_text_tower(card, dimension)
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime" or "dimension" not in card.facts:
            raise
        dimension = card.facts["dimension"]
        print(f"note: the dimension is what the card says, because {_missing(error)}", file=sys.stderr)
    facts = digest(card, dimension)
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        print(f"{key:14} {value if isinstance(value, str) else json.dumps(value)}")


def _sync(
    source: str, target: "Target", prefix: str | None, watch: bool, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Follow a folder once, or until Ctrl-C; exit code 1 if a picture could not be taken."""
    from service.jobs.watch import follow

    def show(done: "Synced") -> None:
        done.changes.account.report()
        if as_json:
            print(json.dumps(done.facts()), flush=True)
            return
        for line in done.lines() if done.dry_run else ():
            print(line)
        print(f"{target.name}: {'would be ' if done.dry_run else ''}{done.summary()}", flush=True)

    if watch:
        follow(source, target, prefix, yes, show)
        return
    done = target.sync(source, prefix, dry_run, yes)
    show(done)
    raise typer.Exit(1 if done.changes.account.lost else 0)


def _finish_index(where: str, done: "Account", as_json: bool) -> NoReturn:
    replaced = f", {done.replaced} replaced" if done.replaced else ""
    said = f"{done.added} pictures added{replaced}, {done.known} there already, {done.bad} could not be read"
    _finish(f"{where}: {said}", done, as_json)


def _finish(sentence: str, account: "Account", as_json: bool = False) -> NoReturn:
    """End a verb with an account of all that it saw; exit code 1 if a picture was lost."""
    print(sentence, file=sys.stderr)
    account.report()
    if as_json:
        print(json.dumps(account.facts()))
    raise typer.Exit(1 if account.lost else 0)


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(
            "this needs the training environment: run `make setup`, then .venv/bin/lookalike, "
            "or install the extra train: pip install '.[cpu,train]' in the project's folder"
        ) from error


def _missing(error: ModuleNotFoundError) -> str:
    """Return what to install for a package that is missing. Raises the error again if no extra has that package."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        raise error
    return (
        f"{package} is not installed: install the extra {_EXTRAS[package]} of lookalike, "
        f"such as pip install '.[{_EXTRAS[package].partition(' ')[0]}]' in the project's folder"
    )


def main() -> None:
    """Run the command; an error of ours is one sentence and exit code 2."""
    try:
        cli()
    except ModuleNotFoundError as error:
        print(f"lookalike: {_missing(error)}", file=sys.stderr)
        sys.exit(2)
    except (LookalikeError, OSError) as error:
        print(f"lookalike: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
