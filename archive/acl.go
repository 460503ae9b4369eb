package archive

import (
	"cmp"
	"encoding/binary"
	"slices"
	"strconv"
	"strings"
)

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// The tags of an ACL's entries, in the order in which the kernel wants them:
// include/uapi/linux/posix_acl.h and posix_acl_xattr.h, Linux 6.12.
const (
	aclVersion  = 2
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
	aclNoID     = 1<<32 - 1
)

type aclEntry struct {
	tag, perm uint16
	id        uint32
}

// applyACL adds the xattr that a text ACL stands for, as star, GNU tar (--acls)
// and libarchive write it: entries TYPE:NAME:PERMISSIONS[:ID], separated by
// commas or line ends. The name may be a number.
//
// An ACL with a name that comes without a number is left out: it belongs to a
// machine we know nothing of. One that says no more than the mode is, too. The
// same ACL as an xattr of the stream has precedence.
func applyACL(h *header, key, text string) error {
	bad := malformed("pax record %s is %s", shorten(key), shorten(text))
	name := aclAccess
	if key == "SCHILY.acl.default" {
		name = aclDefault
	}
	if slices.ContainsFunc(h.xattrs, func(x xattr) bool { return x.name == name }) {
		return nil
	}
	var entries []aclEntry
	for s := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		s, _, _ = strings.Cut(s, "#") // comment: what the mask leaves of it
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		e, known, ok := parseACLEntry(s)
		if !ok {
			return bad
		}
		if !known {
			return nil
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b aclEntry) int {
		return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.id, b.id))
	})
	count := map[uint16]int{}
	for i, e := range entries {
		if count[e.tag]++; i > 0 && e == entries[i-1] {
			return bad
		}
	}
	named := count[aclUser]+count[aclGroup] > 0
	if count[aclUserObj] != 1 || count[aclGroupObj] != 1 || count[aclOther] != 1 || count[aclMask] > 1 || named && count[aclMask] == 0 {
		return bad
	}
	if name == aclAccess && len(entries) == 3 {
		return nil
	}
	value := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range entries {
		value = binary.LittleEndian.AppendUint16(value, e.tag)
		value = binary.LittleEndian.AppendUint16(value, e.perm)
		value = binary.LittleEndian.AppendUint32(value, e.id)
	}
	h.xattrs = append(h.xattrs, xattr{name, string(value)})
	return nil
}

// parseACLEntry reads one entry. known is false if it has a name without an id.
func parseACLEntry(s string) (e aclEntry, known, ok bool) {
	f := strings.Split(s, ":")
	if len(f) == 2 { // other:r-x and mask:r-x of Solaris
		f = []string{f[0], "", f[1]}
	}
	if len(f) != 3 && len(f) != 4 {
		return e, false, false
	}
	tags := map[string][2]uint16{
		"user": {aclUserObj, aclUser}, "group": {aclGroupObj, aclGroup}, "mask": {aclMask}, "other": {aclOther},
	}
	pair, ok := tags[f[0]]
	if !ok {
		return e, false, false
	}
	e.tag, e.id = pair[0], aclNoID
	known = true
	if f[1] != "" {
		e.tag = pair[1]
		id := f[1]
		if len(f) == 4 {
			id = f[3]
		}
		n, err := strconv.ParseUint(id, 10, 32)
		if e.tag == 0 || err == nil && n == aclNoID {
			return e, false, false
		}
		e.id, known = uint32(n), err == nil
	}
	for i, c := range []byte(f[2]) {
		p := strings.IndexByte("xwr", c)
		if c == '-' {
			continue
		}
		if p < 0 || i > 2 {
			return e, false, false
		}
		e.perm |= 1 << p
	}
	return e, known, true
}
