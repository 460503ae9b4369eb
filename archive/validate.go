package archive

// Validate returns all that is wrong with the options, for callers that write
// later than they take options.
func (o *WriteOptions) Validate() error { return o.validate() }
