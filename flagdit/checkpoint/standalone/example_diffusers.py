"""Draws a picture with this folder. Needs torch, diffusers and, for prompts, transformers; nothing is downloaded.

python example.py "a red fox" fox.png
python example.py "a red fox" fox.png --vae FOLDER --text-encoder FOLDER     (where they are not in here)
python example.py 207 dog.png                                                (class-conditional models)
"""

import argparse
import json
from pathlib import Path

from diffusers import AutoModel, DiffusionPipeline

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", help="a prompt, or a class id")
    parser.add_argument("out", type=Path, help="picture file to write")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--vae", help="folder of the autoencoder")
    parser.add_argument("--text-encoder", help="folder of the text encoder and its tokenizer")
    args = parser.parse_args()
    index = json.loads((FOLDER / "model_index.json").read_text())
    # A stock pipeline wants to hear of every part that is not in the folder.
    parts = {name: None for name, kind in index.items() if kind == [None, None]}
    if args.vae:
        parts["vae"] = AutoModel.from_pretrained(args.vae)
    if args.text_encoder:
        import transformers

        parts["text_encoder"] = transformers.AutoModel.from_pretrained(args.text_encoder)
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(args.text_encoder)
    own = (FOLDER / "pipeline.py").exists()
    code = {"custom_pipeline": str(FOLDER), "trust_remote_code": True} if own else {}
    pipe = DiffusionPipeline.from_pretrained(FOLDER, **code, **parts)
    classes = own and pipe.transformer.config.num_classes
    given = {"class_labels": [int(args.what)]} if classes else {"prompt": args.what}
    if not own:
        # The even grid of the model's training framework; the scheduler shifts it.
        given["sigmas"] = [1 - i / args.steps for i in range(args.steps)]
        width, height = index["_trained_size"]
        given |= {"width": width, "height": height}
    pipe(num_inference_steps=args.steps, **given).images[0].save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
