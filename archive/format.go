package archive

import (
	"bytes"
	"cmp"
	"path"
	"slices"
	"strconv"
	"strings"
)

// The largest numbers of ustar's octal fields.
const (
	maxOctal7  = 1<<21 - 1 // seven digits: owners, device numbers
	maxOctal11 = 1<<33 - 1 // eleven digits: size, time
)

// appendHeader appends the header of an entry: one ustar block, and before it
// a pax header with what does not fit. h.stored bytes must follow, padded to
// whole blocks. Directories have a slash at the end of their name.
//
// For a sparse file the map of holes (see [appendMap]) is a part of what
// follows and of h.stored.
func appendHeader(dst []byte, h *header) []byte {
	var room [4]record
	recs := paxRecords(room[:0], h)
	name := h.name
	if h.isSparse {
		dir, base := splitName(name)
		name = path.Join(dir, "GNUSparseFile.0", base)
	}
	if len(recs) > 0 {
		// The block is filled in when the length of what follows is known.
		start := len(dst)
		dst = append(dst, make([]byte, blockSize)...)
		for _, r := range recs {
			dst = appendRecord(dst, r)
		}
		n := len(dst) - start - blockSize
		dst = appendPadding(dst, n)
		dir, base := splitName(strings.TrimSuffix(h.name, "/"))
		x := header{typ: typePAX, stored: int64(n)}
		if dir == "" || base == "." {
			x.name = path.Join(dir, "PaxHeaders.0", base)
		} else {
			x.name = dir + "/PaxHeaders.0/" + base
		}
		fillBlock(dst[start:start+blockSize], &x, x.name, "")
	}
	start := len(dst)
	dst = append(dst, make([]byte, blockSize)...)
	fillBlock(dst[start:], h, name, h.link)
	return dst
}

func appendPadding(dst []byte, n int) []byte {
	return append(dst, make([]byte, -n&(blockSize-1))...)
}

// paxRecords appends what a ustar block cannot hold, ordered by key.
func paxRecords(recs []record, h *header) []record {
	if !h.isSparse {
		if _, _, ok := ustarName(h.name); !ok {
			recs = append(recs, record{"path", h.name})
		}
	}
	if len(h.link) > 100 || !isASCII([]byte(h.link)) {
		recs = append(recs, record{"linkpath", h.link})
	}
	if h.mtime.nsec != 0 || h.mtime.sec < 0 || h.mtime.sec > maxOctal11 {
		recs = append(recs, record{"mtime", formatTime(h.mtime)})
	}
	if h.hasAtime {
		recs = append(recs, record{"atime", formatTime(h.atime)})
	}
	if h.uid > maxOctal7 {
		recs = append(recs, record{"uid", strconv.FormatInt(h.uid, 10)})
	}
	if h.gid > maxOctal7 {
		recs = append(recs, record{"gid", strconv.FormatInt(h.gid, 10)})
	}
	if h.stored > maxOctal11 {
		recs = append(recs, record{"size", strconv.FormatInt(h.stored, 10)})
	}
	if h.isSparse {
		recs = append(recs, record{"GNU.sparse.major", "1"})
		recs = append(recs, record{"GNU.sparse.minor", "0"})
		recs = append(recs, record{"GNU.sparse.name", h.name})
		recs = append(recs, record{"GNU.sparse.realsize", strconv.FormatInt(h.size, 10)})
	}
	for _, x := range h.xattrs {
		recs = append(recs, record{"SCHILY.xattr." + x.name, x.value})
	}
	if len(recs) > 1 {
		slices.SortFunc(recs, func(a, b record) int { return cmp.Compare(a.key, b.key) })
	}
	return recs
}

// appendRecord appends "LENGTH KEY=VALUE\n", where LENGTH counts its own digits.
func appendRecord(dst []byte, r record) []byte {
	n := len(r.key) + len(r.value) + 3
	size := n + digits(n)
	size = n + digits(size)
	dst = strconv.AppendInt(dst, int64(size), 10)
	dst = append(dst, ' ')
	dst = append(dst, r.key...)
	dst = append(dst, '=')
	dst = append(dst, r.value...)
	return append(dst, '\n')
}

func digits(n int) int {
	d := 1
	for ; n >= 10; n /= 10 {
		d++
	}
	return d
}

// formatTime returns decimal seconds without useless zeros.
func formatTime(t stamp) string {
	if t.nsec == 0 {
		return strconv.FormatInt(t.sec, 10)
	}
	var room [40]byte
	b := room[:0]
	if t.sec < 0 {
		b, t = append(b, '-'), stamp{-t.sec - 1, 1e9 - t.nsec}
	}
	b = strconv.AppendInt(b, t.sec, 10)
	dot := len(b)
	b = strconv.AppendInt(b, 1e9+t.nsec, 10)
	b[dot] = '.' // over the 1 that kept the zeros
	return string(bytes.TrimRight(b, "0"))
}

// ustarName splits a name into the prefix and name fields.
func ustarName(s string) (prefix, name string, ok bool) {
	if !isASCII([]byte(s)) {
		return "", "", false
	}
	if len(s) <= 100 {
		return "", s, true
	}
	if len(s) > 256 {
		return "", "", false
	}
	// The slash in between is not stored; the one at the end of a directory
	// belongs to its name.
	i := strings.LastIndexByte(s[:min(156, len(s)-1)], '/')
	if i <= 0 || len(s)-i-1 > 100 {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}

// fillBlock makes a ustar block of zeros. What does not fit is cut off.
func fillBlock(b []byte, h *header, name, link string) {
	prefix, short, ok := ustarName(name)
	if !ok {
		short = ascii(name)
		short = short[:min(len(short), 100)]
		if h.typ == typeDir && !strings.HasSuffix(short, "/") {
			short = short[:min(len(short), 99)] + "/"
		}
	}
	copy(b[0:100], short)
	octal(b[100:108], int64(h.mode))
	octal(b[108:116], fits(h.uid, maxOctal7))
	octal(b[116:124], fits(h.gid, maxOctal7))
	octal(b[124:136], fits(h.stored, maxOctal11))
	octal(b[136:148], fits(h.mtime.sec, maxOctal11))
	b[156] = h.typ
	copy(b[157:257], ascii(link))
	copy(b[257:265], "ustar\x0000")
	if h.typ == typeChar || h.typ == typeBlock {
		octal(b[329:337], int64(h.major))
		octal(b[337:345], int64(h.minor))
	}
	copy(b[345:500], prefix)
	sum, _ := checksums(b)
	octal(b[148:155], sum)
	b[155] = ' '
}

// ascii drops what is not ASCII, for fields that a pax record overrides.
func ascii(s string) string {
	if isASCII([]byte(s)) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if r >= 0x80 {
			return -1
		}
		return r
	}, s)
}

func fits(n, most int64) int64 {
	if n < 0 || n > most {
		return 0
	}
	return n
}

// octal fills a field with digits and a NUL at the end.
func octal(b []byte, n int64) {
	for i := len(b) - 2; i >= 0; i-- {
		b[i] = '0' + byte(n&7)
		n >>= 3
	}
}

// appendMap appends the map of holes of pax sparse format 1.0, padded to whole
// blocks. A hole at the end is followed by an extent of length 0: GNU tar takes
// the end of the last extent for the size of the file.
func appendMap(dst []byte, extents []extent, size int64) []byte {
	start := len(dst)
	if n := len(extents); n == 0 || extents[n-1].off+extents[n-1].len < size {
		extents = append(extents[:n:n], extent{size, 0})
	}
	dst = strconv.AppendInt(dst, int64(len(extents)), 10)
	for _, e := range extents {
		dst = append(dst, '\n')
		dst = strconv.AppendInt(dst, e.off, 10)
		dst = append(dst, '\n')
		dst = strconv.AppendInt(dst, e.len, 10)
	}
	dst = append(dst, '\n')
	return appendPadding(dst, len(dst)-start)
}

// endMark is two zero blocks.
const endMark = 2 * blockSize
