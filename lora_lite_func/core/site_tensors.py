"""SiteTensors: what an Adapter gives for one of its paths."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

from torch import Tensor

__all__ = ["SiteTensors"]


class SiteTensors(dict[str, Tensor]):
    """One site's {lora_name: tensor}: a dict that can be read, copied, pickled (as an OrderedDict)
    and mapped like any other, and not written on, since the adapter wouldn't change with it.
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "a site's tensors: an Adapter is immutable and does not support item assignment; make "
            "another one by tree algebra, or take dict(params[path])"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.load(weights_only=True) makes none but this kind of dict by a call
        return OrderedDict, (), None, None, iter(self.items())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()
