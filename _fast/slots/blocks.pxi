# The block pool: which KV block is free, shared, or findable by its content.
#
# A block is in exactly one of three states:
#   used             refs > 0, in no list
#   free             refs == 0, in the free list; its content is dead
#   free and cached  the same, with its hash in the index: its content can be revived by `retain`
# The free list is circular and doubly linked through `next`/`prev`; position `num_blocks` is its
# sentinel. Blocks are taken from the front; what is worth keeping is put at the back, so reuse is LRU.

@cython.final
cdef class BlockPool:
    """KV blocks by number: allocation, sharing, and an index from content to block.

    A full block's identity is hash(parent's hash, its tokens), SipHash-128 under a key that only this
    engine knows, from a root that depends on a salt: nobody can make two different prefixes collide.
    """

    cdef readonly int num_blocks, block_size, num_free, num_cached
    cdef readonly bint enable_prefix_caching
    cdef Hash key
    cdef int32_t* next
    cdef int32_t* prev
    cdef int32_t* refs_
    cdef Hash* hashes
    cdef uint8_t* indexed
    cdef int32_t* index
    cdef size_t mask

    def __cinit__(
        self, int num_blocks, int block_size, const uint8_t[::1] hash_key, bint enable_prefix_caching=True
    ):
        cdef int i
        cdef size_t cells = 8
        if num_blocks < 1 or block_size < 1 or hash_key.shape[0] != 16:
            raise ValueError("a block pool needs num_blocks >= 1, block_size >= 1 and a hash_key of 16 bytes")
        while cells < 2 * <size_t>num_blocks:
            cells *= 2
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_free, self.num_cached = num_blocks, 0
        memcpy(&self.key, &hash_key[0], 16)
        self.mask = cells - 1
        self.next = <int32_t*>_alloc((num_blocks + 1) * sizeof(int32_t))
        self.prev = <int32_t*>_alloc((num_blocks + 1) * sizeof(int32_t))
        self.refs_ = <int32_t*>_alloc(num_blocks * sizeof(int32_t))
        self.hashes = <Hash*>_alloc(num_blocks * sizeof(Hash))
        self.indexed = <uint8_t*>_alloc(num_blocks)
        self.index = <int32_t*>_alloc(cells * sizeof(int32_t))
        memset(self.index, 0xFF, cells * sizeof(int32_t))
        for i in range(num_blocks + 1):
            self.next[i] = i + 1 if i < num_blocks else 0
            self.prev[i] = i - 1 if i else num_blocks

    def __dealloc__(self):
        free(self.next); free(self.prev); free(self.refs_)
        free(self.hashes); free(self.indexed); free(self.index)

    # -- the free list -------------------------------------------------------------------------------

    cdef inline void _unlink(self, int block) noexcept:
        self.next[self.prev[block]] = self.next[block]
        self.prev[self.next[block]] = self.prev[block]
        self.num_free -= 1

    cdef inline void _link_after(self, int block, int left) noexcept:
        cdef int right = self.next[left]
        self.next[left] = self.prev[right] = block
        self.prev[block], self.next[block] = left, right
        self.num_free += 1

    cdef inline int _allocate(self) noexcept:
        """The least worthy free block with one reference, its hash dropped; -1 if none is free."""
        cdef int block = self.next[self.num_blocks]
        if block == self.num_blocks:
            return -1
        self._unlink(block)
        self._forget(block)
        self.refs_[block] = 1
        return block

    cdef inline void _retain(self, int block) noexcept:
        if self.refs_[block] == 0:
            self._unlink(block)
        self.refs_[block] += 1

    cdef inline void _free(self, int block) noexcept:
        self.refs_[block] -= 1
        if self.refs_[block] == 0:
            self._link_after(block, self.prev[self.num_blocks] if self.indexed[block] else self.num_blocks)

    # -- the index -----------------------------------------------------------------------------------

    cdef inline int _find(self, Hash h) noexcept:
        cdef size_t cell = h.lo & self.mask
        cdef int block
        while True:
            block = self.index[cell]
            if block < 0 or (self.hashes[block].lo == h.lo and self.hashes[block].hi == h.hi):
                return block
            cell = (cell + 1) & self.mask

    cdef inline void _publish(self, int block, Hash h) noexcept:
        """Indexes a full block, unless another one already stands for the same content."""
        cdef size_t cell
        if self.indexed[block] or self._find(h) >= 0:
            return
        cell = h.lo & self.mask
        while self.index[cell] >= 0:
            cell = (cell + 1) & self.mask
        self.index[cell] = block
        self.hashes[block] = h
        self.indexed[block] = True
        self.num_cached += 1

    cdef void _forget(self, int block) noexcept:
        """Takes a block out of the index; linear probing closes the gap by moving later entries back."""
        cdef size_t hole, cell, home
        if not self.indexed[block]:
            return
        self.indexed[block] = False
        self.num_cached -= 1
        hole = self.hashes[block].lo & self.mask
        while self.index[hole] != block:
            hole = (hole + 1) & self.mask
        cell = hole
        while True:
            cell = (cell + 1) & self.mask
            if self.index[cell] < 0:
                break
            home = self.hashes[self.index[cell]].lo & self.mask
            # An entry may fill the hole if the hole lies on its way from its home to where it stands.
            if ((cell - home) & self.mask) >= ((cell - hole) & self.mask):
                self.index[hole] = self.index[cell]
                hole = cell
        self.index[hole] = -1

    cdef inline Hash _extend(self, Hash parent, const int32_t* tokens) noexcept:
        cdef uint64_t v[4]
        cdef size_t size = self.block_size * sizeof(int32_t)
        _sip_start(v, self.key)
        _sip_word(v, parent.lo)
        _sip_word(v, parent.hi)
        return _sip_end(v, <const uint8_t*>tokens, size, size + 16)

    # -- from Python ---------------------------------------------------------------------------------

    def chain(self, const int32_t[::1] tokens, bytes salt=b"") -> bytes:
        """The identities of a sequence's prefixes: 16 bytes for the root, then 16 per full block.

        Empty if prefix caching is off.
        """
        cdef Hash h
        cdef Py_ssize_t i, full = tokens.shape[0] // self.block_size
        cdef bytes out
        cdef char* at
        if not self.enable_prefix_caching:
            return b""
        # Blocks hash to messages of a multiple of 4 bytes; the root's never is, so they cannot meet.
        root = salt + b"\x01"
        root += bytes(3 - (len(root) + 2) % 4)
        root = siphash128(<bytes>(<char*>&self.key)[:16], root)
        out = PyBytes_FromStringAndSize(NULL, 16 * (full + 1))
        at = out
        memcpy(at, <char*>root, 16)
        memcpy(&h, at, 16)
        for i in range(full):
            h = self._extend(h, &tokens[i * self.block_size])
            memcpy(at + 16 * (i + 1), &h, 16)
        return out

    def match(self, bytes chain, int num_tokens) -> list:
        """The cached blocks of the longest known prefix; at most `num_tokens` - 1 tokens are covered,
        for the last token's logits are still to be computed. Takes no reference."""
        cdef list found = []
        cdef Hash h
        cdef int i, block
        for i in range(self._matchable(chain, num_tokens)):
            memcpy(&h, <char*>chain + 16 * (i + 1), 16)
            block = self._find(h)
            if block < 0:
                break
            found.append(block)
        return found

    cdef inline int _matchable(self, bytes chain, int num_tokens) noexcept:
        return min(max(<int>(len(chain) // 16) - 1, 0), (num_tokens - 1) // self.block_size)

    def allocate(self) -> int:
        """A free block, now with one reference; -1 if there is none."""
        return self._allocate()

    def retain(self, int block) -> None:
        """One more reference. A free block may only be revived if it is cached."""
        self._own(block, 0 if 0 <= block < self.num_blocks and self.indexed[block] else 1)
        self._retain(block)

    def free(self, int block) -> None:
        """One reference less; without any, the block can be reused."""
        self._own(block, 1)
        self._free(block)

    def publish(self, int block, bytes identity) -> None:
        """Makes a full block findable under one entry (16 bytes) of a `chain`."""
        cdef Hash h
        self._own(block, 1)
        if len(identity) != 16:
            raise ValueError("an identity has 16 bytes")
        memcpy(&h, <char*>identity, 16)
        self._publish(block, h)

    def refs(self, int block) -> int:
        self._own(block, 0)
        return self.refs_[block]

    def is_cached(self, int block) -> bool:
        self._own(block, 0)
        return bool(self.indexed[block])

    cdef int _own(self, int block, int refs) except -1:
        if not 0 <= block < self.num_blocks or self.refs_[block] < refs:
            raise ValueError(f"block {block} is not one of {self.num_blocks} with at least {refs} references")
        return 0

    def reset(self) -> None:
        """Forgets every hash: nothing computed so far is found again."""
        cdef int i
        for i in range(self.num_blocks):
            self.indexed[i] = False
        memset(self.index, 0xFF, (self.mask + 1) * sizeof(int32_t))
        self.num_cached = 0

    def check(self) -> None:
        """Raises RuntimeError if the free list, the counts or the index contradict each other."""
        cdef int block, last, listed = 0, indexed = 0, cells = 0
        cdef size_t cell
        last, block = self.num_blocks, self.next[self.num_blocks]
        while block != self.num_blocks:
            if self.prev[block] != last or self.refs_[block] != 0 or listed > self.num_blocks:
                raise RuntimeError(f"the free list is broken at block {block}")
            listed += 1
            last, block = block, self.next[block]
        if listed != self.num_free or self.prev[self.num_blocks] != last:
            raise RuntimeError(f"the free list holds {listed} blocks; {self.num_free} were counted")
        for block in range(self.num_blocks):
            if self.refs_[block] < 0:
                raise RuntimeError(f"block {block} has {self.refs_[block]} references")
            listed += self.refs_[block] > 0
            indexed += self.indexed[block]
            if self.indexed[block] and self._find(self.hashes[block]) != block:
                raise RuntimeError(f"block {block} is not found by its own hash")
        for cell in range(self.mask + 1):
            cells += self.index[cell] >= 0
        if listed != self.num_blocks:
            raise RuntimeError(f"{self.num_blocks - listed} blocks are neither used nor free")
        if indexed != self.num_cached or cells != self.num_cached:
            raise RuntimeError(f"{self.num_cached} cached blocks counted, {indexed} marked, {cells} indexed")
