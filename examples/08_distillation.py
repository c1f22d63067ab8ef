"""Distil an MoE teacher into a dense student, and measure it against one trained alone.

Twice: with all labels, where the two students see the same batches and the distilled one is told
what the teacher finds likely as well; and with few labels, where the student alone has the labelled
images only, and the distilled one asks the teacher about all images and sees no label
(Hinton et al. 2015). Compare the student's accuracy on its own training images with that on the
test: where both are alike, it lacks size, which no teacher gives; where they are far apart, it
lacks knowledge, which a teacher has.

    python examples/08_distillation.py --seeds 3
"""

import argparse

from _digits import DATA, fit, measure

from npmoe import nn
from npmoe.craft import distillation_loss
from npmoe.models import init_vision_params, vision_backward, vision_forward, vision_loss
from npmoe.training import vision_recipe
from npmoe.tree import num_elements


def alone(model):
    def compute_grads(params, images, labels):
        return vision_loss(images, labels, params, model).grads

    return compute_grads


def distilled(model, teacher, teacher_model, temperature, share):
    """`share` of the loss comes from the teacher, the rest from the labels."""
    quiet = teacher_model.moe.for_evaluation()

    def compute_grads(params, images, labels):
        teacher_logits, _ = vision_forward(images, teacher, teacher_model, moe=quiet)
        logits, saved = vision_forward(images, params, model)
        _, log_sum_exp = nn.cross_entropy(logits, labels)
        grad = nn.cross_entropy_backward(1 - share, logits, labels, log_sum_exp)
        _, grad_soft = distillation_loss(
            logits, teacher_logits, temperature=temperature, coefficient=share
        )
        return vision_backward(grad + grad_soft, saved, params, model)

    return compute_grads


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=500, help="of the students")
    parser.add_argument("--hidden-size", type=int, default=24, help="of the students")
    parser.add_argument("--temperature", type=float, default=3.0)
    parser.add_argument("--labels", type=int, default=100, help="how many few labels are")
    options = parser.parse_args()

    config = vision_recipe(DATA, steps=options.teacher_steps, hidden_size=32, num_layers=2)
    teacher_model = config.model
    teacher = fit(init_vision_params(teacher_model, 0), config, alone(teacher_model))
    best = measure(teacher, teacher_model, config)
    print(f"teacher: {num_elements(teacher):,} parameters, accuracy {best[0]:.2%}")
    few = DATA.train.select(slice(options.labels))
    settings = {"all labels": (DATA.train, 0.5), f"{options.labels} labels": (few, 1.0)}
    for setting, (labelled, share) in settings.items():
        results = {"teacher": [best], "alone": [], "distilled": []}
        fits = []
        for seed in range(options.seeds):
            config = vision_recipe(
                DATA,
                steps=options.steps,
                seed=seed,
                dense=True,
                hidden_size=options.hidden_size,
                num_layers=1,
                learning_rate=5e-3,
            )
            model = config.model
            start = init_vision_params(model, seed)
            taught = distilled(model, teacher, teacher_model, options.temperature, share)
            ways = {"alone": (alone(model), labelled), "distilled": (taught, DATA.train)}
            for name, (compute_grads, data) in ways.items():
                student = fit(start, config, compute_grads, data)
                results[name].append(measure(student, model, config))
                if name == "alone":
                    fits.append(measure(student, model, config, data=labelled)[0])
            print(
                f"{setting}, seed {seed}, student of {num_elements(start):,} parameters: accuracy "
                f"alone {results['alone'][-1][0]:.2%}, distilled {results['distilled'][-1][0]:.2%}",
                flush=True,
            )
        for column, what in enumerate(("accuracy", "loss in nats")):
            mean = {n: sum(r[column] for r in rs) / len(rs) for n, rs in results.items()}
            gap = mean["teacher"] - mean["alone"]
            closed = (mean["distilled"] - mean["alone"]) / gap if gap else 0.0
            print(
                f"{setting}: mean {what} of the teacher {mean['teacher']:.4f}, alone "
                f"{mean['alone']:.4f}, distilled {mean['distilled']:.4f}: {closed:.0%} of the gap "
                "closed"
            )
        print(
            f"{setting}: of the images that it was trained on, the student alone has "
            f"{sum(fits) / len(fits):.2%} right"
        )


if __name__ == "__main__":
    main()
