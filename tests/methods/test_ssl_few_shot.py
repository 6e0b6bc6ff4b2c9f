"""SSL-few-shot: prototypes against the authors' arrays and numbers worked by hand, the episodic recipe, weights."""

import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.ssl_few_shot import class_means, negative_squared_distance, prototype_logits

TINY = {"size": 32, "width": 4, "rkhs": 40, "depth": 1, "way": 3, "queries": 2}


def tiny(weights=None, **config):
    torch.manual_seed(0)
    return create_method("ssl_few_shot", num_classes=5, weights=weights, **{**TINY, **config})


def episode(way=3, rows=3, seed=1):
    """Images of one colour a class: ``(rows way, 3, 32, 32)``, class after class."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randn(way, 3, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(rows * way, 3, 32, 32, generator=generator)
    return colors.repeat(rows, 1, 1, 1) + noise


class TestPrototypes:
    def test_logits_loss_and_gradients_are_the_authors(self, golden):
        arrays = golden("ssl_few_shot_proto_1shot")
        support, query = (torch.from_numpy(arrays[name]).requires_grad_() for name in ("support", "query"))
        logits = prototype_logits(support, query, int(arrays["way"]), float(arrays["temperature"]))
        labels = torch.from_numpy(arrays["labels"])
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        close = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"]), **close)
        torch.testing.assert_close(loss, torch.tensor(arrays["loss"]), **close)
        torch.testing.assert_close(support.grad, torch.from_numpy(arrays["grad_support"]), **close)
        torch.testing.assert_close(query.grad, torch.from_numpy(arrays["grad_query"]), **close)
        assert (logits.argmax(1) == labels).float().mean() == pytest.approx(float(arrays["acc"]))

    def test_two_shots_by_hand(self):
        support = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 0.0], [4.0, 2.0]])  # classes 0, 1, 0, 1
        query = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        # prototypes (1, 0) and (4, 1)
        expected = torch.tensor([[0.0, -10.0], [-1.0, -9.0]])
        assert torch.equal(prototype_logits(support, query, 2), expected)
        assert torch.equal(prototype_logits(support, query, 2, temperature=2.0), expected / 2)
        prototypes = class_means(support, torch.tensor([0, 1, 0, 1]), 2)
        assert torch.equal(negative_squared_distance(query, prototypes), expected)

    def test_are_at_most_zero_scale_with_the_square_and_ignore_a_shift(self):
        torch.manual_seed(0)
        support, query = torch.randn(6, 5).double(), torch.randn(4, 5).double()
        logits = prototype_logits(support, query, 3)
        assert logits.max() <= 0
        torch.testing.assert_close(prototype_logits(3 * support, 3 * query, 3), 9 * logits)
        shift = torch.randn(5).double()
        torch.testing.assert_close(prototype_logits(support + shift, query + shift, 3), logits)

    def test_one_shot_prototypes_are_the_support_and_its_own_queries_are_at_zero(self):
        support = torch.randn(3, 5)
        assert torch.equal(class_means(support, torch.arange(3), 3), support)
        assert torch.equal(prototype_logits(support, support, 3).diagonal(), torch.zeros(3))

    def test_order_of_support_makes_no_difference_and_that_of_classes_moves_along(self):
        torch.manual_seed(0)
        support, query = torch.randn(2, 3, 5), torch.randn(4, 5)
        logits = prototype_logits(support.flatten(0, 1), query, 3)
        torch.testing.assert_close(prototype_logits(support.flip(0).flatten(0, 1), query, 3), logits)
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(prototype_logits(support[:, order].flatten(0, 1), query, 3), logits[:, order])

    def test_gradient_of_a_query_is_the_pull_of_the_prototypes(self):
        torch.manual_seed(0)
        support, query = torch.randn(3, 5).double(), torch.randn(6, 5).double().requires_grad_()
        labels, tau = torch.arange(3).repeat(2), 7.0
        logits = prototype_logits(support, query, 3, tau)
        F.cross_entropy(logits, labels).backward()
        weights = logits.detach().softmax(1) - F.one_hot(labels, 3)
        torch.testing.assert_close(query.grad, 2 / (tau * 6) * weights @ support)

    def test_many_episodes_at_once_are_those_one_by_one(self):
        support, query = torch.randn(4, 6, 5), torch.randn(4, 9, 5)
        together = prototype_logits(support, query, 3)
        torch.testing.assert_close(together, torch.stack([prototype_logits(*x, 3) for x in zip(support, query)]))  # noqa: B905

    def test_classes_may_have_different_numbers_of_images(self):
        features = torch.tensor([[1.0], [5.0], [3.0], [7.0]])
        assert class_means(features, torch.tensor([1, 0, 1, 1]), 2).flatten().tolist() == pytest.approx([5, 11 / 3])

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: class_means(torch.zeros(2, 3), torch.tensor([0, 2]), 3), "class 1 of 3 has no image"),
            (lambda: class_means(torch.zeros(0, 3), torch.zeros(0).long(), 1), "class 0 of 1 has no image"),
            (lambda: class_means(torch.zeros(2, 3), torch.tensor([0, 3]), 3), r"labels of 0 to 2, got \[0, 3\]"),
            (lambda: class_means(torch.zeros(2, 3), torch.zeros(3).long(), 3), r"expected features \(M, D\)"),
            (lambda: negative_squared_distance(torch.zeros(2, 3), torch.zeros(2, 4)), "negative_squared_distance: exp"),
            (lambda: prototype_logits(torch.zeros(4, 2), torch.zeros(1, 2), 3), "a multiple of 3 support rows"),
            (lambda: prototype_logits(torch.zeros(0, 2), torch.zeros(1, 2), 3), "a multiple of 3 support rows"),
        ],
    )
    def test_bad_arguments_are_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestMethod:
    def test_loss_falls_over_ten_steps_and_reaches_every_parameter(self):
        method = tiny(lr=0.02, temperature=16.0)
        ((optimizer, schedule),) = method.optimizers(total_steps=10)
        batch, losses = {"image": episode()[None]}, []
        for _ in range(10):
            scalars = method.training_step(batch)
            optimizer.zero_grad()
            scalars["loss"].backward()
            optimizer.step()
            schedule.step()
            losses.append(scalars["loss"].item())
        assert losses[-1] < 0.9 * losses[0]
        assert scalars["accuracy"] == 1
        assert all(p.grad is not None for p in method.parameters())

    def test_a_step_is_the_mean_over_its_episodes(self):
        both = torch.stack([episode(seed=1), episode(seed=2)])
        together = tiny().training_step({"image": both})["loss"]
        alone = [tiny().training_step({"image": one[None]})["loss"] for one in both]
        torch.testing.assert_close(together, torch.stack(alone).mean())

    def test_support_and_queries_are_normalised_apart_or_together(self):
        images = episode()
        apart, together = tiny(), tiny(joint_norm=True)
        maps = apart.train().embed(images[:3]), apart.embed(images[3:])
        torch.testing.assert_close(apart.episode_logits(images, 1.0), prototype_logits(*maps, 3))
        torch.testing.assert_close(
            together.episode_logits(images, 1.0), prototype_logits(*together.embed(images).split([3, 6]), 3)
        )
        apart.eval()
        together.load_state_dict(apart.state_dict())
        torch.testing.assert_close(apart.episode_logits(images, 1.0), together.eval().episode_logits(images, 1.0))

    def test_prediction_is_the_nearest_mean(self):
        method, images = tiny(shot=2, queries=1).eval(), episode()
        with torch.no_grad():
            logits = method.predict(images[6:], images[:6], torch.arange(3).repeat(2))
            torch.testing.assert_close(logits, method.episode_logits(images, 1.0))
            assert method.predict(images[6:], images[:2], torch.zeros(2).long()).shape == (3, 1)
        with pytest.raises(ValueError, match="no support image"):
            method.predict(images, images[:0], torch.zeros(0).long())

    def test_rate_falls_at_the_start_of_every_tenth_epoch(self):
        ((optimizer, schedule),) = tiny(lr=1.0, epochs=30).optimizers(total_steps=60)
        rates = []
        for _ in range(60):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == [1.0] * 18 + [0.5] * 20 + [0.25] * 20 + [0.125] * 2  # epochs 1-9, 10-19, 20-29, 30

    def test_wrong_number_of_images_is_refused(self):
        with pytest.raises(ValueError, match=r"expected 9 images an episode \(3 classes, 1 \+ 2 each\), got 8"):
            tiny().training_step({"image": episode()[None, :8]})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"way": 1}, "way is 1, expected 2 or more; one class has nothing to learn"),
            ({"shot": 0}, "shot is 0"),
            ({"queries": 0}, "queries is 0"),
            ({"temperature": 0.0}, "temperature is 0.0"),
            ({"shots": 5}, "unknown setting 'shots', did you mean 'shot'"),
        ],
    )
    def test_bad_configurations_are_refused_by_name(self, config, message):
        with pytest.raises(FastcamError, match=f"ssl_few_shot'?: {message}"):
            tiny(**config)


class TestWeights:
    @pytest.fixture
    def pretrained(self, tmp_path):
        torch.manual_seed(5)
        method = create_method("amdim", num_classes=1, size=32, width=4, rkhs=40, depth=1)
        method.encoder(torch.randn(8, 3, 32, 32))  # batch norm has seen something
        about = {"method": "amdim", "num_classes": 1, "backbone": None, "config": vars(method.config)}
        save_weights(tmp_path / "amdim.safetensors", method.export_state_dict(), about)
        return method, tmp_path / "amdim.safetensors"

    def test_training_starts_from_the_pre_trained_encoder(self, pretrained):
        method, path = pretrained
        images = episode()
        assert torch.equal(tiny(weights=path).eval().embed(images), method.eval().embed(images))
        assert not torch.equal(tiny().eval().embed(images), method.embed(images))

    def test_of_another_encoder_or_network_are_refused(self, pretrained, tmp_path):
        with pytest.raises(FastcamError, match=r"rkhs is 40, but method.rkhs is 48; make them equal"):
            tiny(weights=pretrained[1], rkhs=48)
        save_weights(tmp_path / "other.safetensors", {}, {"method": "cam"})
        with pytest.raises(FastcamError, match=r"are of cam, expected those that fastcam train wrote for amdim"):
            tiny(weights=tmp_path / "other.safetensors")

    def test_saved_and_loaded_predicts_the_same(self, tmp_path):
        method, images = tiny(), episode()
        method.training_step({"image": images[None]})  # moves the running statistics
        about = {"method": "ssl_few_shot", "num_classes": 5, "backbone": None, "config": vars(method.config)}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), about)
        again = load_method(tmp_path / "w.safetensors")
        labels = torch.arange(3)
        ours, theirs = (m.eval().predict(images, images[:3], labels) for m in (method, again))
        assert torch.equal(ours, theirs)
