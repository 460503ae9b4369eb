package devmapper

import (
	"crypto/sha256"
	"encoding/hex"
)

// maxName is the longest name of a device: DM_NAME_LEN less its NUL.
const maxName = 127

// deviceName joins a prefix and an id. An id that does not fit is cut, and one
// that is the pool's is marked; neither can be equal to another id's name,
// since no id has "+", which dmsetup shows as it is.
func deviceName(prefix, id string) string {
	const hashed = 1 + 16
	name := prefix + "-" + id
	if len(name) <= maxName && id != "pool" {
		return name
	}
	sum := sha256.Sum256([]byte(id))
	return name[:min(len(name), maxName-hashed)] + "+" + hex.EncodeToString(sum[:8])
}
