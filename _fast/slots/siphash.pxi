# SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, 2012), for little-endian machines.

cdef struct Hash:
    uint64_t lo
    uint64_t hi


cdef inline uint64_t _rotl(uint64_t x, int b) noexcept:
    return (x << b) | (x >> (64 - b))


cdef inline void _sip_rounds(uint64_t* v, int rounds) noexcept:
    cdef int i
    for i in range(rounds):
        v[0] += v[1]; v[1] = _rotl(v[1], 13) ^ v[0]; v[0] = _rotl(v[0], 32)
        v[2] += v[3]; v[3] = _rotl(v[3], 16) ^ v[2]
        v[0] += v[3]; v[3] = _rotl(v[3], 21) ^ v[0]
        v[2] += v[1]; v[1] = _rotl(v[1], 17) ^ v[2]; v[2] = _rotl(v[2], 32)


cdef inline void _sip_word(uint64_t* v, uint64_t m) noexcept:
    v[3] ^= m
    _sip_rounds(v, 2)
    v[0] ^= m


cdef void _sip_start(uint64_t* v, Hash key) noexcept:
    v[0] = key.lo ^ 0x736F6D6570736575ULL
    v[1] = key.hi ^ 0x646F72616E646F6DULL ^ 0xEE
    v[2] = key.lo ^ 0x6C7967656E657261ULL
    v[3] = key.hi ^ 0x7465646279746573ULL


cdef Hash _sip_end(uint64_t* v, const uint8_t* data, size_t size, size_t total) noexcept:
    """Absorbs `data` as the rest of a message of `total` bytes, of which whole words came before."""
    cdef uint64_t word
    cdef size_t i = 0
    cdef Hash out
    while i + 8 <= size:
        memcpy(&word, data + i, 8)
        _sip_word(v, word)
        i += 8
    word = 0
    if i < size:
        memcpy(&word, data + i, size - i)
    _sip_word(v, word | (<uint64_t>total << 56))
    v[2] ^= 0xEE
    _sip_rounds(v, 4)
    out.lo = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xDD
    _sip_rounds(v, 4)
    out.hi = v[0] ^ v[1] ^ v[2] ^ v[3]
    return out


def siphash128(const uint8_t[::1] key, const uint8_t[::1] data) -> bytes:
    """SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, 2012), keyed with 16 bytes."""
    cdef Hash k, out
    cdef uint64_t v[4]
    if key.shape[0] != 16:
        raise ValueError(f"the key must have 16 bytes, not {key.shape[0]}")
    memcpy(&k, &key[0], 16)
    _sip_start(v, k)
    out = _sip_end(v, &data[0] if data.shape[0] else NULL, data.shape[0], data.shape[0])
    return (<char*>&out)[:16]
