package archive

// UsePortable makes Apply use the implementation of other systems.
func UsePortable(o *ApplyOptions) { o.portable = true }

// WritePortable does the same for Write and its kin.
func WritePortable(o *WriteOptions) { o.portable = true }

// ComparePortable does the same for Compare.
func ComparePortable(o *CompareOptions) { o.portable = true }

// NoListxattrat makes Compare do without listxattrat.
func NoListxattrat(o *CompareOptions) { o.noAt = true }

// NoOpenat2 makes look-ups in lower layers go component by component.
func NoOpenat2(o *ApplyOptions) { o.noOpenat2 = true }

// FewDescriptors makes Apply keep only two directories open.
func FewDescriptors(o *ApplyOptions) { o.fdCapacity = 2 }

// FixChecksums makes the checksums of all that looks like a header right, so
// that a fuzzer gets past them.
func FixChecksums(data []byte) []byte {
	data = append([]byte(nil), data...)
	for b := data; len(b) >= blockSize; b = b[blockSize:] {
		if string(b[257:262]) == "ustar" {
			sum, _ := checksums(b)
			octal(b[148:155], sum)
			b[155] = ' '
		}
	}
	return data
}
