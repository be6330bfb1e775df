"""Several threads, and programs that patch, copy or break off: one network is never seen half changed."""

import copy
import os
import threading

import pytest
import torch
from torch import nn

import aha
from aha.attributors import count_passes, create, libra
from aha.protection import locked, protected, undisturbed

from .toys import TINY_DECODER, pictures, tiny_classifier, tiny_vit


def in_threads(*works, timeout=60):
    """Run the functions at once; their results, or the first exception."""
    found: list = [None] * len(works)

    def run(number):
        try:
            found[number] = works[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "the threads wait for one another"
    for value in found:
        if isinstance(value, BaseException):
            raise value
    return found


def test_a_pass_of_another_thread_does_not_meet_the_hooks(classifier, images):
    expected = classifier(images)
    inside, done = threading.Event(), threading.Event()
    results = []

    def patch():
        double = [(classifier.module.head, lambda _module, _args, out: 2 * out)]
        with undisturbed(classifier, double):
            inside.set()
            done.wait(0.3)
            results.append(classifier(images))

    def look():
        inside.wait()
        results.append(classifier(images))
        done.set()

    in_threads(patch, look)
    torch.testing.assert_close(results[0], 2 * expected)
    assert torch.equal(results[1], expected)


def test_two_wrappers_of_one_network_share_its_lock(images):
    net = tiny_vit()
    one, other = (aha.Classifier.wrap(net, (0.5,) * 3, (0.5,) * 3, (32, 32)) for _ in range(2))
    methods = [create("libragrad", one), create("rollout", other), create("input_x_gradient", other)]
    alone = [method.attribute(images) for method in methods]
    for _ in range(5):
        for got, expected in zip(in_threads(*(lambda m=m: m.attribute(images) for m in methods)), alone, strict=True):
            assert torch.equal(got, expected)


def test_networks_that_explain_each_other_do_not_wait_for_ever(images):
    a, b = tiny_classifier(seed=0), tiny_classifier(seed=1)
    of_a, of_b = (aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER) for clf in (a, b))

    def refined(explainer, clf):
        return lambda: [aha.refine(explainer, clf, images, 0, 1, fractions=3) for _ in range(4)]

    def method(explainer, clf):
        made = create("aha", clf, explainer=explainer, steps=1, fractions=3)
        return lambda: [made.attribute(images, 0) for _ in range(4)]

    in_threads(refined(of_a, b), refined(of_b, a), method(of_b, a), method(of_a, b))


def test_passes_are_those_of_the_thread_that_counts(classifier, images):
    inside, done = threading.Event(), threading.Event()

    def count():
        with count_passes(classifier) as passes:
            inside.set()
            done.wait(10)
            classifier(images)
        return passes.forward

    def run():
        inside.wait()
        for _ in range(3):
            classifier(images)
        done.set()

    assert in_threads(count, run)[0] == len(images)


def test_a_child_process_does_not_inherit_held_locks(classifier, images):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    held, release = threading.Event(), threading.Event()

    def hold():
        with locked(classifier):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        with locked(classifier):
            os._exit(7)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_all_is_as_before_also_after_an_exception(classifier, error):
    module = classifier.module
    module.blocks[0].train()
    module.blocks[1].requires_grad_(True)
    module.compile(backend="eager")
    kept = module._compiled_call_impl
    before = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in module.modules()]

    def broken_off():
        with protected(classifier), undisturbed(classifier):
            assert not any(m.training for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
            raise error

    with pytest.raises(error):
        broken_off()
    assert before == [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in module.modules()]
    assert module._compiled_call_impl is kept
    # and the lock is free
    assert in_threads(lambda: classifier(pictures()).shape) == [(3, 5)]


def test_inside_libra_gradients_stay_those_of_libra_when_entries_nest(classifier, images):
    with libra(classifier.module):
        first = create("input_x_gradient", classifier).attribute(images, 0)
        aha.Explainer.build(classifier, evidence=False, decoder=TINY_DECODER).attribute(images)
        assert torch.equal(create("input_x_gradient", classifier).attribute(images, 0), first)
    assert not torch.equal(create("input_x_gradient", classifier).attribute(images, 0), first)


def test_copies_have_locks_of_their_own(classifier, images):
    other = copy.deepcopy(classifier)
    with locked(classifier):
        assert in_threads(lambda: other(images).shape) == [(3, 5)]
    torch.testing.assert_close(other(images), classifier(images))


def test_a_dropout_that_the_user_switched_on_again(images):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 1024, 4))
    clf = aha.Classifier.wrap(net, input_size=(32, 32))
    expected = clf(images)
    net.train()
    assert torch.equal(clf(images), expected)
    assert net.training
    metric = aha.metrics.DeletionInsertion(clf)
    metric.update(images, images[:, :1])
    first = metric.compute()["deletion"]
    metric.reset()
    metric.update(images, images[:, :1])
    assert metric.compute()["deletion"] == first
