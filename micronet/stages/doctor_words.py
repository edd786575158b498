"""What ``doctor`` found, in words: sections of names with a few words each."""

from typing import Any

from micronet.errors import count, listed

GIB = 1 << 30
MOST_GPUS = 4


def described(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the machine, the packages, what is missing, and what is fast here and what is not, in words by name."""
    packages, missing = {}, {}
    for each in found["packages"]:
        if each["version"] is not None:
            extra = ", ".join(each.get("providers") or each.get("devices") or [])
            packages[each["name"]] = f"{each['version']} ({extra})" if extra else each["version"]
        else:
            problem = f"broken: {each['problem']}; " if "problem" in each else ""
            missing[each["name"]] = f"{problem}for {each['purpose']}: {each['install']}"
    sections = {"machine": _machine(found), "packages": packages, "missing": missing}
    for fast, title in ((True, "fast here"), (False, "slow or missing here")):
        sections[title] = {}
        for each in found["advice"]:
            if each["fast"] is fast:
                earlier = sections[title].get(each["topic"])
                sections[title][each["topic"]] = f"{earlier}; {each['text']}" if earlier else each["text"]
    return {title: entries for title, entries in sections.items() if entries}


def _machine(found: dict[str, Any]) -> dict[str, str]:
    processor, memory, cache = found["processor"], found["memory"], found["kernel_cache"]
    [torch] = [each for each in found["packages"] if each["name"] == "torch"]
    cores, threads = count(processor["cores"], "usable core"), count(processor["threads"], "thread")
    return {
        "micronet": f"{found['micronet']}, Python {found['python']}, {found['system']}",
        "processor": f"{processor['name']}, {cores}, {threads}",
        "has": " ".join(name for name, own in processor["features"].items() if own) or "unknown features",
        "memory": f"{memory['free_bytes'] / GIB:.1f} of {memory['total_bytes'] / GIB:.1f} GiB free",
        "GPU": listed(torch.get("gpus") or ["none that torch can use"], MOST_GPUS),
        "C compiler": found["compilers"]["cc"] or "none",
        "for aarch64": found["compilers"]["aarch64"] or "none",
        "kernels": f"{cache['folder']}, {'writable' if cache['writable'] else cache['problem']}",
    }
