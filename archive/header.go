package archive

import (
	"bytes"
	"encoding/base64"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// The types of entries, POSIX pax(1) and GNU tar's tar.h.
const (
	typeReg     = '0'
	typeLink    = '1'
	typeSymlink = '2'
	typeChar    = '3'
	typeBlock   = '4'
	typeDir     = '5'
	typeFifo    = '6'
	typeCont    = '7' // "contiguous file", a regular file to everybody

	typePAX       = 'x'
	typePAXGlobal = 'g'
	typeGNUName   = 'L'
	typeGNULink   = 'K'
	typeGNUSparse = 'S'
	typeGNUDump   = 'D' // directory with a list of its contents as data
	typeGNUVolume = 'V'
)

// stamp is a point in time as tar and the kernel have it. nsec is 0 to
// 999,999,999 also before 1970.
type stamp struct {
	sec, nsec int64
}

// xattr is one extended attribute.
type xattr struct {
	name, value string
}

// extent is a range of a sparse file that has data.
type extent struct {
	off, len int64
}

// header is one entry of a stream.
type header struct {
	name     string // as in the stream
	link     string
	typ      byte // one of typeReg to typeFifo
	mode     uint32
	uid, gid int64
	size     int64 // of the file
	stored   int64 // bytes of it that are in the stream
	mtime    stamp
	atime    stamp
	hasAtime bool
	major    uint32
	minor    uint32
	xattrs   []xattr
	sparse   []extent // where the stored bytes belong, if isSparse
	isSparse bool
}

// field returns a NUL-terminated string.
func field(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// number reads an octal number, or a base-256 number (GNU, star: the first bit
// is set, two's complement, big endian).
func number(b []byte) (int64, bool) {
	if len(b) > 0 && b[0]&0x80 != 0 {
		return base256(b)
	}
	for len(b) > 0 && (b[0] == ' ' || b[0] == 0) {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == 0) {
		b = b[:len(b)-1]
	}
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	var n int64
	for _, c := range b {
		if c < '0' || c > '7' || n >= 1<<60 {
			return 0, false
		}
		n = n<<3 | int64(c-'0')
	}
	return n, true
}

func base256(b []byte) (int64, bool) {
	var flip byte
	if b[0]&0x40 != 0 {
		flip = 0xff
	}
	var n uint64
	for i, c := range b {
		c ^= flip
		if i == 0 {
			c &= 0x7f // the mark, not a digit
		}
		if n>>56 != 0 {
			return 0, false
		}
		n = n<<8 | uint64(c)
	}
	if n>>63 != 0 {
		return 0, false
	}
	if flip != 0 {
		return ^int64(n), true
	}
	return int64(n), true
}

// checksums returns the two sums that are in use: of unsigned bytes (POSIX)
// and of signed ones (old Sun tar).
func checksums(b []byte) (unsigned, signed int64) {
	b = b[:blockSize]
	var high int64
	for i := range b {
		unsigned += int64(b[i])
		high += int64(b[i] >> 7)
	}
	signed = unsigned - 256*high
	for _, c := range b[148:156] {
		unsigned += ' ' - int64(c)
		signed += ' ' - int64(int8(c))
	}
	return unsigned, signed
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// parseBlock reads a header block without what extends it.
func parseBlock(b []byte, h *header) error {
	want, ok := number(b[148:156])
	if u, s := checksums(b); !ok || want != u && want != s {
		return malformed("wrong header checksum")
	}
	num := func(what string, b []byte) int64 {
		n, good := number(b)
		if !good {
			ok = false
		}
		return n
	}
	*h = header{
		name: field(b[0:100]),
		typ:  b[156],
		link: field(b[157:257]),
		mode: uint32(num("mode", b[100:108]) & 0o7777),
		uid:  num("uid", b[108:116]),
		gid:  num("gid", b[116:124]),
		size: num("size", b[124:136]),
	}
	h.mtime.sec = num("mtime", b[136:148])
	gnu := string(b[257:265]) == "ustar  \x00"
	if gnu || string(b[257:263]) == "ustar\x00" {
		var prefix []byte
		switch {
		case gnu:
			// GNU: what POSIX uses for the prefix holds times. Old versions of
			// Go wrote the GNU magic and a prefix; those times do not parse.
			atime, good1 := number(b[345:357])
			_, good2 := number(b[357:369]) // ctime
			if (good1 || b[345] == 0) && (good2 || b[357] == 0) {
				h.atime, h.hasAtime = stamp{atime, 0}, b[345] != 0
			} else if p := field(b[345:500]); isASCII([]byte(p)) {
				prefix = b[345:500]
			}
		case string(b[508:512]) == "tar\x00":
			prefix = b[345:476]
			if b[476] != 0 {
				h.atime.sec, h.hasAtime = num("atime", b[476:488]), true
			}
		default:
			prefix = b[345:500]
		}
		if h.typ == typeChar || h.typ == typeBlock {
			h.major = uint32(num("devmajor", b[329:337]))
			h.minor = uint32(num("devminor", b[337:345]))
		}
		if p := field(prefix); p != "" {
			h.name = p + "/" + h.name
		}
	}
	if !ok {
		return malformed("header has a field that is not a number")
	}
	if h.size < 0 {
		return malformed("negative size")
	}
	return nil
}

func isASCII(b []byte) bool {
	for _, c := range b {
		if c >= 0x80 {
			return false
		}
	}
	return true
}

// record is one pax record.
type record struct {
	key, value string
}

// parseRecords reads the body of a pax header: "LENGTH KEY=VALUE\n" …
func parseRecords(s string) ([]record, error) {
	var out []record
	for s != "" {
		digits := strings.IndexByte(s, ' ')
		if digits <= 0 || digits > 19 {
			return nil, malformed("pax record has no length")
		}
		n, err := strconv.ParseUint(s[:digits], 10, 63)
		if err != nil || n > uint64(len(s)) || int(n) <= digits+2 || s[n-1] != '\n' {
			return nil, malformed("pax record has a wrong length")
		}
		key, value, ok := strings.Cut(s[digits+1:n-1], "=")
		if !ok || key == "" || strings.IndexByte(key, 0) >= 0 {
			return nil, malformed("pax record has no key")
		}
		out = append(out, record{key, value})
		s = s[n:]
	}
	return out, nil
}

// paxTime reads seconds with a fraction; digits past nanoseconds are cut off.
func paxTime(s string) (stamp, bool) {
	whole, frac, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return stamp{}, false
	}
	var nsec int64
	for i := range 9 {
		nsec *= 10
		if i < len(frac) {
			nsec += int64(frac[i] - '0')
		}
	}
	for _, c := range frac {
		if c < '0' || c > '9' {
			return stamp{}, false
		}
	}
	if whole[0] == '-' && nsec > 0 {
		if sec == -1<<63 {
			return stamp{}, false
		}
		return stamp{sec - 1, 1e9 - nsec}, true
	}
	return stamp{sec, nsec}, true
}

// gnuSparse is what pax records say about holes.
type gnuSparse struct {
	major, minor string
	name         string
	realSize     int64
	hasSize      bool
	numbers      []int64 // offset, length, offset, …
	isSparse     bool
}

// maxExtents limits the memory that a map of holes may take to 16 MB.
const maxExtents = 1 << 20

// applyRecords puts what pax records say into h.
func applyRecords(h *header, recs []record, sp *gnuSparse) error {
	for _, r := range recs {
		if err := applyRecord(h, r, sp); err != nil {
			return err
		}
	}
	return nil
}

func applyRecord(h *header, r record, sp *gnuSparse) error {
	bad := func() error { return malformed("pax record %s is %s", shorten(r.key), shorten(r.value)) }
	decimal := func(to *int64) error {
		n, err := strconv.ParseInt(r.value, 10, 64)
		if err != nil || n < 0 {
			return bad()
		}
		*to = n
		return nil
	}
	switch r.key {
	case "path":
		if r.value != "" {
			h.name = r.value
		}
	case "linkpath":
		if r.value != "" {
			h.link = r.value
		}
	}
	if r.value == "" && !strings.Contains(r.key, ".xattr.") {
		return nil // an empty value takes back an earlier record
	}
	switch r.key {
	case "size":
		return decimal(&h.size)
	case "uid":
		return decimal(&h.uid)
	case "gid":
		return decimal(&h.gid)
	case "mtime", "atime":
		t, ok := paxTime(r.value)
		if !ok {
			return bad()
		}
		if r.key == "mtime" {
			h.mtime = t
		} else {
			h.atime, h.hasAtime = t, true
		}
	case "SCHILY.devmajor", "SCHILY.devminor":
		var n int64
		if err := decimal(&n); err != nil {
			return err
		}
		if n > 1<<32-1 {
			return bad()
		}
		if r.key == "SCHILY.devmajor" {
			h.major = uint32(n)
		} else {
			h.minor = uint32(n)
		}
	case "GNU.sparse.major":
		sp.major, sp.isSparse = r.value, true
	case "GNU.sparse.minor":
		sp.minor = r.value
	case "GNU.sparse.name":
		sp.name = r.value
	case "GNU.sparse.size", "GNU.sparse.realsize":
		sp.hasSize = true
		return decimal(&sp.realSize)
	case "GNU.sparse.numblocks":
		sp.isSparse = true
	case "GNU.sparse.map":
		sp.isSparse = true
		sp.numbers = sp.numbers[:0]
		for s := range strings.SplitSeq(r.value, ",") {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil || n < 0 || len(sp.numbers) >= 2*maxExtents {
				return bad()
			}
			sp.numbers = append(sp.numbers, n)
		}
	case "GNU.sparse.offset", "GNU.sparse.numbytes":
		// Version 0.0 repeats these two, in turns.
		var n int64
		if err := decimal(&n); err != nil {
			return err
		}
		if (len(sp.numbers)%2 == 0) != (r.key == "GNU.sparse.offset") || len(sp.numbers) >= 2*maxExtents {
			return bad()
		}
		sp.isSparse = true
		sp.numbers = append(sp.numbers, n)
	case "SCHILY.acl.access", "SCHILY.acl.default":
		return applyACL(h, r.key, r.value)
	default:
		return applyXattr(h, r)
	}
	return nil
}

func applyXattr(h *header, r record) error {
	name, ok := strings.CutPrefix(r.key, "SCHILY.xattr.")
	value := r.value
	if !ok {
		// libarchive: name URL-encoded, value in base64, often without padding.
		if name, ok = strings.CutPrefix(r.key, "LIBARCHIVE.xattr."); !ok {
			return nil
		}
		n, err := url.PathUnescape(name)
		if err != nil {
			return malformed("pax record %s has a wrong escape", shorten(r.key))
		}
		v, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "=\n"))
		if err != nil {
			return malformed("pax record %s is not base64", shorten(r.key))
		}
		name, value = n, string(v)
	}
	if name == "" || strings.IndexByte(name, 0) >= 0 {
		return malformed("pax record %s names no xattr", shorten(r.key))
	}
	if i := slices.IndexFunc(h.xattrs, func(x xattr) bool { return x.name == name }); i >= 0 {
		h.xattrs[i].value = value
		return nil
	}
	h.xattrs = append(h.xattrs, xattr{name, value})
	return nil
}

// setSparse checks a map of holes and puts it into h. stored is what the
// stream holds of the file.
func setSparse(h *header, numbers []int64, realSize int64) error {
	if len(numbers)%2 != 0 {
		return malformed("map of holes has half an entry")
	}
	h.isSparse, h.size, h.sparse = true, realSize, nil
	var end, sum int64
	for i := 0; i < len(numbers); i += 2 {
		off, n := numbers[i], numbers[i+1]
		if off < end || n < 0 || off > realSize || n > realSize-off {
			return malformed("map of holes is not in order or leaves the file")
		}
		end, sum = off+n, sum+n
		if n > 0 {
			h.sparse = append(h.sparse, extent{off, n})
		}
	}
	if sum != h.stored {
		return malformed("map of holes has %d bytes, the entry %d", sum, h.stored)
	}
	return nil
}
