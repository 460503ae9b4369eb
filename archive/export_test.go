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
